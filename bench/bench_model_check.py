"""Every end-to-end row's h, dX, dA, dB of one step against stock peft in fp32 over the same weights, before its timing.

Rows with dropout: the masks that the step drew, layer by layer, are given to the fp32 model. A compiled model does not
show its masks: there each output must lie as far from the fp32 model's without dropout as another draw of the masks
puts it, to a factor of 1.5.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from bench_check import WrongResult
from bench_model import ModelRow, Run, with_adapters
from torch import Tensor, nn

from fusedlora import dropout

# Of bf16 through all blocks and back, the largest over all layers: stock peft has about 2e-2 for dA and dB, seldom
# 5e-2 where a layer's gradient is small. The errors themselves are in the tables.
LIMIT = 0.1
FACTOR = 1.5
Outputs = dict[str, list[Tensor]]


def errors(found: Outputs, expected: Outputs) -> dict[str, float]:
    """‖out − ref‖ / ‖ref‖ by kind, the largest over its tensors; NaN counts as infinite."""
    largest = {}
    for kind, tensors in found.items():
        worst = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(tensors, expected[kind], strict=True)]
        largest[kind] = max(error if error == error else float("inf") for error in worst)
    return largest


class _Given(nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.view(x.shape) / (1 - self.p)


class Reference:
    """Stock peft in fp32 over copies of the weights; the results without dropout are kept."""

    def __init__(self, base: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.base, self.x, self.dy = base, x, dy
        self.frozen = self._outputs(None, 0.0, None)
        self.plain = self._outputs("bf16", 0.0, None)
        self.away: dict[float, dict[str, float]] = {}

    def _outputs(self, adapter: str | None, p: float, masks: list[Tensor] | None) -> Outputs:
        row = ModelRow("frozen" if adapter is None else "peft", adapter, p)  # "bf16": no autocast over what is in fp32
        # Checkpointed: attention in fp32 may be written out, a matrix of all pairs of tokens a head.
        model = with_adapters(self.base, row, checkpointing=True, precise=True)
        if masks is not None:
            layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]  # in the calls' order
            for layer, mask in zip(layers, masks, strict=True):
                layer.lora_dropout["default"] = _Given(mask, p)
        x = self.x.detach().float().requires_grad_()
        return Run(row, model, x, self.dy).outputs()

    def check(self, run: Run) -> dict[str, float]:
        """Errors by kind of one step of the run.

        Raises:
            WrongResult: one is above LIMIT, or with unknown masks not as far off as a dropout puts it.
        """
        row = run.row
        if row.dropout and row.compiled:
            return self._check_distance(run)
        if not row.dropout:
            expected, found = self.frozen if row.adapter is None else self.plain, run.outputs()
        else:
            layers = sum(hasattr(module, "lora_dropout") for module in run.model.modules())
            with kept(run) as masks:
                found = run.outputs()
            if len(masks) < layers:
                raise WrongResult(f"{len(masks)} of {layers} layers drew a mask")
            rate = 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
            if abs(rate / row.dropout - 1) > 0.1:
                raise WrongResult(f"dropout took {rate:.4f} of x, not {row.dropout}")
            # checkpointing draws again, the same, when it runs a block once more: the first of each count
            expected = self._outputs("bf16", row.dropout, masks[:layers])
        largest = errors(found, expected)
        for kind, error in largest.items():
            if error > LIMIT:
                raise WrongResult(f"{kind} is off by {error:.1e}, the limit is {LIMIT:.0e}")
        return largest

    def _check_distance(self, run: Run) -> dict[str, float]:
        p = run.row.dropout
        if p not in self.away:
            self.away[p] = errors(self._outputs("bf16", p, None), self.plain)
        found = errors(run.outputs(), self.plain)
        for kind, distance in found.items():
            if not self.away[p][kind] / FACTOR <= distance <= self.away[p][kind] * FACTOR:
                raise WrongResult(f"{kind} is {distance:.1e} from that without dropout, not {self.away[p][kind]:.1e}")
        return {}


@contextlib.contextmanager
def kept(run: Run) -> Iterator[list[Tensor]]:
    """The masks that the eager model's dropouts draw, in the order of the calls."""
    masks: list[Tensor] = []
    if run.row.library == "fusedlora":
        draw = dropout.draw

        def drawing(x: Tensor, dropout_p: float, backend: str) -> Tensor:
            drawn = draw(x, dropout_p, backend)
            masks.append(dropout.as_mask(drawn, x.numel() // x.shape[-1], x.shape[-1], dropout_p, x.device))
            return drawn

        with mock.patch.object(dropout, "draw", drawing):
            yield masks
        return
    hooks = [
        module.register_forward_hook(lambda module, args, out: masks.append(out.detach() != 0))
        for name, module in run.model.named_modules()
        if "lora_dropout" in name and isinstance(module, nn.Dropout)
    ]
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()
