"""A decoder with the shapes of Llama-3-8B and adapters on its seven projections: the rows of the end-to-end tables.

The frozen weights are random and the same tensors in every row. The embedding and the head are left out: hidden states
go in, a random gradient of the last ones comes back, and it flows through to the first ones.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, SCALING = 16, 2.0
DROPOUT = 0.05
UPDATE = 0.25  # of the adapter's output beside the base's: enough to be seen in h, not so much that rounding grows
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A decoder and its batch."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def title(self) -> str:
        return (
            f"{self.layers} layers of width {self.width} and {self.inner}, {self.heads} heads, {self.kv_heads} for "
            f"keys, {self.batch} × {self.length} tokens, r={R} on {len(TARGETS)} projections"
        )


LLAMA_3_8B = Size(layers=4, width=4096, inner=14336, heads=32, kv_heads=8, batch=2, length=4096)
TINY = Size(layers=2, width=64, inner=128, heads=4, kv_heads=2, batch=2, length=16)


@dataclass(frozen=True)
class ModelRow:
    """A way to train the decoder. adapter: "bf16"; "fp32", under autocast, as PEFT's default is run; None: frozen."""

    library: str  # "frozen", "peft", "fusedlora"
    adapter: str | None = None
    dropout: float = 0.0
    compiled: bool = False

    @property
    def name(self) -> str:
        parts = (self.library, "amp" if self.adapter == "fp32" else "", "compiled" if self.compiled else "")
        return "_".join(filter(None, (*parts, "dropout" if self.dropout else "")))

    @property
    def label(self) -> str:
        adapters = {"bf16": ", bf16 adapters", "fp32": ", fp32 adapters, autocast", None: ""}[self.adapter]
        return (
            {"frozen": "frozen model", "peft": "peft", "fusedlora": "fusedlora by fuse()"}[self.library]
            + adapters
            + (f", dropout {self.dropout}" if self.dropout else "")
            + (", torch.compile" if self.compiled else "")
        )


def model_rows(*, compile: bool) -> list[ModelRow]:
    """The frozen model first, then stock peft, then ours; without dropout, then with."""
    rows = [ModelRow("frozen", compiled=compiled) for compiled in (False, True)]
    for dropout in (0.0, DROPOUT):
        for library in ("peft", "fusedlora"):
            for compiled in (False, True):
                rows += [ModelRow(library, adapter, dropout, compiled) for adapter in ("fp32", "bf16")]
    return [row for row in rows if compile or not row.compiled]


def decoder(size: Size, device: torch.device) -> nn.Module:
    """Frozen, in bf16, random."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        attn_implementation="sdpa",
        initializer_range=size.width**-0.5,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        return LlamaModel(config).to(DTYPE).requires_grad_(False)


def with_adapters(base: nn.Module, row: ModelRow, *, checkpointing: bool, precise: bool = False) -> nn.Module:
    """The row's model over base's own weights; precise: over copies of them in fp32.

    The adapters are the same in every row, rounded to bf16 whatever their dtype.
    """
    model = copy.deepcopy(base, None if precise else {id(p): p for p in base.parameters()})
    if precise:
        model.float()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if row.library != "frozen":
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(r=R, lora_alpha=int(SCALING * R), lora_dropout=row.dropout, target_modules=list(TARGETS))
        model = get_peft_model(model, config, autocast_adapter_dtype=row.adapter == "fp32")
        for number, layer in enumerate(m for m in model.modules() if isinstance(m, LoraLayer)):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            generator = torch.Generator(a.device).manual_seed(number)
            for part, scale in ((a, 1.0), (b, UPDATE / SCALING)):
                draw = torch.randn(part.shape, device=part.device, generator=generator)
                part.data.copy_((draw * scale * part.shape[1] ** -0.5).to(DTYPE))
        if row.library == "fusedlora":
            from fusedlora.integrations.peft import fuse

            fuse(model)
    return model.train()


class Run:
    """A row's model with its training steps, over one batch."""

    def __init__(
        self,
        row: ModelRow,
        model: nn.Module,
        x: Tensor,
        dy: Tensor,
        compiler: str = "inductor",
    ) -> None:
        self.row, self.model, self.x, self.dy = row, model, x, dy
        self.call: Callable = torch.compile(model, backend=compiler, dynamic=False) if row.compiled else model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=x.is_cuda)

    def forward_backward(self) -> Tensor:
        """The last hidden states; the gradients are in x.grad and the parameters'."""
        autocast = torch.autocast(self.x.device.type, DTYPE) if self.row.adapter == "fp32" else contextlib.nullcontext()
        with autocast:
            h: Tensor = self.call(inputs_embeds=self.x).last_hidden_state
        torch.autograd.backward(h, self.dy.to(h.dtype))
        return h.detach()

    def clear(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def step(self) -> None:
        """Forward and backward."""
        self.forward_backward()
        self.clear()

    def optimizer_step(self) -> None:
        """Forward, backward, clipping and AdamW; the frozen model has nothing to optimize."""
        self.forward_backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        self.clear()

    def outputs(self) -> dict[str, list[Tensor]]:
        """h and the gradients of one step by kind, of the adapters a list over layers in the model's order."""
        h = self.forward_backward()
        found: dict[str, list[Tensor]] = {"h": [h], "dX": [self.x.grad]}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = "dA" if "lora_A" in name else "dB"
                found.setdefault(kind, []).append(parameter.grad)
        self.clear()
        return found
