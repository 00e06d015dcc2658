"""Inputs of a case, and the check that every row passes before it is timed."""

import torch
from bench_cases import Case
from bench_layers import DROPOUT, SCALING, Kept, Layer
from torch import Tensor

# ‖out − ref‖ / ‖ref‖ above which nothing is timed; eager arithmetic stays below half of it.
ERROR_LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
TF32_LIMIT = 2e-3
OUTPUTS = ("y", "dX", "dA", "dB", "dm")  # dm: of DoRA's magnitude


def make_layers(case: Case, device: torch.device, count: int) -> list[Layer]:
    """Random sets; x is a leaf that requires a gradient."""
    generator = torch.Generator(device).manual_seed(case.M + case.N + case.r)

    def draw(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(rows, columns, device=device, generator=generator) * scale).to(dtype)

    dtype = case.torch_dtype
    # dA grows as √(M · N / r) · dy, past fp16's largest number at the sweep's shapes
    dy_scale = case.N**-0.5 if dtype == torch.float16 else 1.0
    layers = []
    for _ in range(count):
        a = draw(case.r, case.K, case.K**-0.5, torch.float32)
        b = draw(case.N, case.r, case.r**-0.5, torch.float32)
        weight = draw(case.N, case.K, case.K**-0.5, dtype)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        layers.append(
            Layer(
                x=draw(case.M, case.K, 1.0, dtype).requires_grad_(),
                dy=draw(case.M, case.N, dy_scale, dtype),
                weight=weight,
                adapters={"same": (a.to(dtype), b.to(dtype)), "fp32": (a, b)},
                magnitude=norm * (1 + draw(case.N, 1, 0.1, torch.float32).view(-1)),
                bias=draw(case.N, 1, 1.0, dtype).view(-1),
            )
        )
    return layers


def memory_of(case: Case, rows: int) -> tuple[int, int]:
    """Bytes of one set, and about those that the rest takes: references in float64, and a graph for each row."""
    x, y, w, size = case.M * case.K, case.M * case.N, case.K * case.N, case.torch_dtype.itemsize
    one = (x + y + w) * size + case.r * (case.K + case.N) * (4 + size)
    return one, 8 * (2 * x + 3 * y + w + 2 * max(x, y)) + rows * 3 * (x + y) * size


def reference(
    layer: Layer,
    adapter: str | None,
    feature: str = "",
    kept: Tensor | None = None,
    frozen: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """y, dX, dA, dB in float64, written out, and with DoRA dm; y and dX alone for the frozen linear.

    kept [M, K] is the mask of the dropout, where that is the feature; frozen the frozen linear's y and dX, if known.
    """
    x, dy, w = layer.x.detach().double(), layer.dy.double(), layer.weight.double()
    if frozen is None:
        frozen = x @ w.t(), dy @ w
    if adapter is None:
        return frozen
    y, dx = frozen
    a, b = (t.double() for t in layer.adapters[adapter])
    if kept is not None:
        x = x.mul_(kept).div_(1 - DROPOUT)
    s = SCALING * (x @ a.t())
    y = y.addmm(s, b.t())
    if feature == "bias":
        y.add_(layer.bias)
    magnitude: tuple[Tensor, ...] = ()
    if feature == "dora":
        m = layer.magnitude.to(layer.adapters[adapter][0].dtype).double()
        norm = torch.linalg.vector_norm(w.addmm(b, a, alpha=SCALING), dim=1)
        magnitude = ((dy * y).sum(0) / norm,)
        y.mul_(m / norm)
        dy.mul_(m / norm)
        dx = dy @ w
    t = SCALING * (dy @ b)
    added = t @ a
    if kept is not None:
        added.mul_(kept).div_(1 - DROPOUT)
    return y, added.add_(dx), t.t() @ x, dy.t() @ s, *magnitude


class WrongResult(AssertionError):
    """An output is too far from the float64 reference to report a speed."""


def compare(
    outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float, names: tuple[str, ...] = OUTPUTS
) -> dict[str, float]:
    """Relative errors in the 2-norm, by name.

    Raises:
        WrongResult: one is above limit, or not a number.
    """
    errors = {}
    for name, out, ref in zip(names[: len(expected)], outputs, expected, strict=True):
        error = ((out.double() - ref).norm() / ref.norm()).item()
        if not error <= limit:  # NaN fails too
            raise WrongResult(f"{name} is off by {error:.1e}, the limit is {limit:.0e}")
        errors[name] = error
    return errors


class Expected:
    """The references of one layer; those without dropout are worked out once, and the frozen linear's part for all."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.known: dict[tuple[str | None, str], tuple[Tensor, ...]] = {}

    def of(self, adapter: str | None, feature: str, kept: Kept) -> tuple[Tensor, ...]:
        """What the latest call, or the latest replay of a captured one, should have given."""
        frozen = self.known.get((None, ""))
        if frozen is None:
            frozen = self.known[None, ""] = reference(self.layer, None)
        if feature == "dropout":
            return reference(self.layer, adapter, feature, read_kept(kept), frozen)
        if (adapter, feature) not in self.known:
            self.known[adapter, feature] = reference(self.layer, adapter, feature, frozen=frozen)
        return self.known[adapter, feature]


def read_kept(kept: Kept) -> Tensor:
    """The mask of the latest call's dropout.

    Raises:
        WrongResult: its rate is not the one asked for: outputs that are right for it would not be a dropout's.
    """
    if kept.read is None:
        raise WrongResult("the call dropped nothing")
    mask = kept.read()
    rate = 1 - mask.mean(dtype=torch.float64).item()
    spread = (DROPOUT * (1 - DROPOUT) / mask.numel()) ** 0.5
    # 15 bits an element make the rate right to 2^-16.
    if abs(rate - DROPOUT) > 6 * spread + 2**-16:
        raise WrongResult(f"dropout took {rate:.4f} of x, not {DROPOUT}")
    return mask


def error_limit(case: Case) -> float:
    limit = ERROR_LIMIT[case.torch_dtype]
    if case.dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        limit = TF32_LIMIT
    return limit
