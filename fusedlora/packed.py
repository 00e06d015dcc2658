"""The plan of calls whose tensors are packed: nothing is left to decide, copy or reshape before a launch."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, node
from .dropout import launch_dropout
from .ops import dispatched
from .plans import Given, Plan, Saved, aligned, packed

_ALL = (True, True, True)
# What the launches below are given, by the names that the C++ node has for it.
_FORWARD = ("x", "w", "a", "b", "bias", None, None, "y", "s")
_BACKWARD = ("dy", "x", "s", "w", "a", "b", None, "dx", "da", "db")


class PackedPlan(Plan):
    """Calls with `packed` tensors whose forward kernels take, or whose backward, or both: one backend's or two's.

    All are of one kind. x, y, dy and dx keep their leading dimensions. A direction without kernels runs as in Plan.
    """

    def __init__(
        self,
        takers: tuple[backends.Backend, backends.Backend],
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        dropout_p: float,
        adapter_dtype: torch.dtype,
        backend: str,
    ) -> None:
        super().__init__(dropout_p, adapter_dtype, backend)
        up, down = takers
        self.names = up.name, down.name
        self.forward_plan = None if up.launchers is None else up.launchers(x.device)[0]
        self.backward_plan = None if down.launchers is None else down.launchers(x.device)[1]
        (self.N, self.K), self.r = weight.shape, lora_A.shape[0]
        self.M = x.numel() // self.K
        self.y_shape = (*x.shape[:-1], self.N)
        self.s_like_x = adapter_dtype is x.dtype
        kinds = (part for tensor in (x, weight, lora_A, lora_B) for part in (tensor.shape, tensor.dtype))
        self.saved: tuple[Any, ...] = (*kinds, (self.M, self.r), adapter_dtype)
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.forwards: dict[bool, Any] = {}  # by whether S is asked for
        self.s_alone: Any = None
        self.gradients: Any = None  # all three
        self.call: Any = None  # the same kind of call in the C++ node
        self.told: set[int] = set()  # of its launches those that it knows

    def forward(self, given: Given, scaling: float, save_s: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.can_fill(given):
            return super().forward(given, scaling, save_s)
        x, _, lora_A, *_ = given
        y = x.new_empty(*self.y_shape)
        s = self.empty_s(x, lora_A) if save_s else None
        self.fill(given, scaling, y, s)
        return y, s

    def can_fill(self, given: Given) -> bool:
        # a seed on the device: captured or compiled, another launch, in no hurry
        seed = given[5]
        return self.forward_plan is not None and (seed is None or not seed.is_cuda)

    def empty_s(self, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        return (x if self.s_like_x else lora_A).new_empty(self.M, self.r)

    def fill(self, given: Given, scaling: float, y: torch.Tensor, s: torch.Tensor | None) -> None:
        """Computes y, and S where there is one."""
        x, weight, lora_A, lora_B, bias, seed, scale = given
        save_s = s is not None
        plan = self.forwards.get(save_s)
        if plan is None:
            plan = self.forwards[save_s] = self._plan_forward(given, save_s=save_s)
        backends.last_used, backends.last_backward = self.names
        numbers = launch_dropout(seed, self.dropout_p, scaling)
        tensors: tuple[torch.Tensor | None, ...] = (x, weight, lora_A, lora_B, bias, None, scale, y)
        if save_s:
            tensors = (*tensors, s)
        plan.launch(tensors, *numbers)
        if self.call is not None:
            self._tell(node.FORWARD_S if save_s else node.FORWARD, plan, _FORWARD[: len(tensors)], numbers[2])

    def fill_s(self, given: Given, scaling: float, s: torch.Tensor) -> None:
        """S alone, in the bits that `fill` gives it: by that where no other launch does."""
        x, weight, lora_A, lora_B, _, seed, scale = given
        if self.s_alone is None:
            self.s_alone = self._plan_forward(given, save_s=True, tiles=False)
        if self.s_alone is None:
            self.fill(given, scaling, x.new_empty(*self.y_shape), s)
            return
        tensors = x, weight, lora_A, lora_B, None, None, scale, None, s
        self.s_alone.launch(tensors, *launch_dropout(seed, self.dropout_p, scaling))

    def _plan_forward(self, given: Given, **settings: Any) -> Any:
        x, weight, lora_A, lora_B, bias, seed, scale = given
        assert self.forward_plan is not None
        return self.forward_plan(
            x.as_strided((self.M, self.K), (self.K, 1)),
            weight,
            lora_A,
            lora_B,
            bias,
            scale=scale,
            gain=None,
            seed=seed,
            adapter_dtype=self.adapter_dtype,
            **settings,
        )

    def backward(
        self, dy: torch.Tensor, saved: Saved, scaling: float, shape: torch.Size, needs: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight, lora_A, lora_B, s, seed, scale = saved
        if (
            self.backward_plan is None
            or needs != _ALL
            or x is None
            or weight is None
            or s is None
            or dispatched(dy, x, weight, lora_A, lora_B)
            or not (packed(x, weight, lora_A, lora_B) and aligned(dy) and aligned(s))
            or (scale is not None and not aligned(scale))
            or (seed is not None and seed.is_cuda)
            # its launch goes by the tuned tables, or by none, as forward did
            or torch.are_deterministic_algorithms_enabled() is not self.deterministic
        ):
            return super().backward(dy, saved, scaling, shape, needs)
        # fmt: off
        kinds = (
            x.shape, x.dtype, weight.shape, weight.dtype, lora_A.shape, lora_A.dtype, lora_B.shape, lora_B.dtype,
            s.shape, s.dtype,
        )
        # fmt: on
        if kinds != self.saved:
            self._refuse(kinds)
        plan = self.gradients
        if plan is None:
            plan = self.gradients = self.backward_plan(
                dy.as_strided((self.M, self.N), (self.N, 1)),
                x.as_strided((self.M, self.K), (self.K, 1)),
                weight,
                lora_A,
                lora_B,
                s,
                scale=scale,
                seed=seed,
                adapter_dtype=self.adapter_dtype,
                needs=_ALL,
            )
        backends.last_used = backends.last_backward = self.names[1]
        dx = dy.new_empty(*shape)
        dA = lora_A.new_empty(self.r, self.K)
        dB = lora_B.new_empty(self.N, self.r)
        numbers = launch_dropout(seed, self.dropout_p, scaling)
        plan.launch((dy, x, s, weight, lora_A, lora_B, scale, dx, dA, dB), *numbers)
        if self.call is not None:
            self._tell(node.BACKWARD, plan, _BACKWARD, numbers[2])
        return dx, dA, dB

    def _refuse(self, kinds: tuple[Any, ...]) -> None:
        """Hooks of saved tensors, or owners of parameters, have changed one since forward."""
        names = ("x", "weight", "lora_A", "lora_B", "S")
        for name, shape, dtype, *made in zip(names, kinds[::2], kinds[1::2], self.saved[::2], self.saved[1::2]):
            if [shape, dtype] != made:
                raise RuntimeError(
                    f"lora_linear's backward got a {dtype} {name} of shape {list(shape)}, "
                    f"where its forward had a {made[1]} one of shape {list(made[0])}"
                )

    def _tell(self, which: int, plan: Any, tensors: tuple[str | None, ...], threshold: int | None) -> None:
        if which not in self.told:
            self.told.add(which)
            node.tell(self.call, which, plan.recipe(tensors, threshold))
