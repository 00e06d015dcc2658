"""Inputs of a case, and the check that every row passes before it is timed."""

import torch
from bench_cases import Case
from bench_contenders import SCALING, Layer
from torch import Tensor

# ‖out − ref‖ / ‖ref‖ above which nothing is timed; eager arithmetic stays below half of it.
ERROR_LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
TF32_LIMIT = 2e-3
OUTPUTS = ("y", "dX", "dA", "dB")


def make_layers(case: Case, device: torch.device, count: int) -> list[Layer]:
    """Random sets; x is a leaf that requires a gradient."""
    generator = torch.Generator(device).manual_seed(case.M + case.N + case.r)

    def draw(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(rows, columns, device=device, generator=generator) * scale).to(dtype)

    dtype = case.torch_dtype
    layers = []
    for _ in range(count):
        a = draw(case.r, case.K, case.K**-0.5, torch.float32)
        b = draw(case.N, case.r, case.r**-0.5, torch.float32)
        layers.append(
            Layer(
                x=draw(case.M, case.K, 1.0, dtype).requires_grad_(),
                dy=draw(case.M, case.N, 1.0, dtype),
                weight=draw(case.N, case.K, case.K**-0.5, dtype),
                adapters={"same": (a.to(dtype), b.to(dtype)), "fp32": (a, b)},
            )
        )
    return layers


def reference(layer: Layer, adapter: str | None) -> tuple[Tensor, ...]:
    """y, dX, dA, dB in float64, written out; y and dX alone for the frozen linear."""
    x, dy, w = layer.x.detach().double(), layer.dy.double(), layer.weight.double()
    y, dx = x @ w.t(), dy @ w
    if adapter is None:
        return y, dx
    a, b = (t.double() for t in layer.adapters[adapter])
    s, t = SCALING * (x @ a.t()), SCALING * (dy @ b)
    return y.addmm_(s, b.t()), dx.addmm_(t, a), t.t() @ x, dy.t() @ s


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


def error_limit(case: Case) -> float:
    limit = ERROR_LIMIT[case.torch_dtype]
    if case.dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        limit = TF32_LIMIT
    return limit
