"""FusedLoRALinear: an nn.Linear with a LoRA adapter. Its merging and its state_dict are in merging.py."""

import math
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .dora import dora_linear
from .functional import lora_linear
from .layer_options import check_options, check_size, with_lora_bias
from .merging import Mergeable


class FusedLoRALinear(Mergeable):
    """y = x Wᵀ + bias + scaling · dropout(x) lora_Aᵀ lora_Bᵀ, W and bias frozen.

    scaling is lora_alpha / r, or lora_alpha / √r with use_rslora (Kalajdzievski, "A Rank Stabilization Scaling Factor
    for Fine-Tuning with LoRA", 2023). As in PEFT lora_A starts Kaiming uniform with a = √5 and lora_B as zeros, so that
    the layer starts as its linear.

    With use_dora y = g ∘ (x Wᵀ + scaling · x lora_Aᵀ lora_Bᵀ) + bias, where g = lora_magnitude_vector / ‖W + scaling ·
    lora_B lora_A‖ for each output (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024); see dora_linear.

    With lora_bias scaling · lora_bias is added to y, outside the dropout as in PEFT: the kernel adds it with the bias.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear, in its order.
        r: rank, at least 1.
        lora_alpha: numerator of scaling.
        lora_dropout: rate of the dropout on the adapter's x while training, in [0, 1).
        use_rslora: divide lora_alpha by √r.
        use_dora: train the norms of the weight's rows by themselves.
        lora_bias: give lora_B a bias, as PEFT's option of that name; not with use_dora.
        adapter_dtype: dtype of the adapter, the weight's or float32. None is float32 over a 16-bit weight, as in
            PEFT, and the weight's dtype over any other.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen here; where one is made to require a
            gradient again, it gets it.
        lora_A [r, in_features], lora_B [out_features, r]: the adapter.
        lora_bias [out_features]: belongs to it with the option lora_bias, else None. It starts as zeros.
        lora_magnitude_vector [out_features]: belongs to it with use_dora, else None. It starts as the norms of the rows
            that the weight has then: where the weight comes later, as from the meta device or from a plain linear's
            state dict, call reset_lora_parameters() after it.
        scaling: the factor itself, free to set: a number, or a floating 0-d tensor on the weight's device, which is
            read there at each call and each replay of a CUDA graph. A tensor is no part of the state dict and does not
            move with the layer, so that several layers may share one; merge() takes the value that it has then.
        backend: "auto", or the name of the backend to insist on.
        last_backend: the one that the latest call took, None before it and under torch.compile; where backward takes
            another one, "cuda forward + triton backward".
        merged: whether the adapter is in the weight now.
        adapters_enabled: False runs the linear alone; where the adapter is merged, forward then raises RuntimeError.

    Raises TypeError and ValueError for arguments outside these rules.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(f"bias is {bias!r}, must be True or False: whether the layer has one")
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}, must be floating point")
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            adapter_dtype=adapter_dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer over the very weight and bias of `linear`: nothing is copied, and both are frozen, there too.

        The adapter lies on the weight's device; the training flag is taken over. Raises TypeError where `linear` is not
        exactly an nn.Linear: a subclass may compute something else.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear is a {type(linear).__name__}, must be exactly an nn.Linear")
        if not isinstance(linear.weight, nn.Parameter):
            raise TypeError("linear.weight is no Parameter: something computes it, such as weight_norm")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        layer._add_adapter(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            adapter_dtype=adapter_dtype,
        )
        return layer.train(linear.training)

    def _add_adapter(
        self,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
        lora_bias: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        weight = self.weight
        dtype = check_options(
            weight,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            adapter_dtype=adapter_dtype,
        )
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.scaling = lora_alpha / self._divisor
        self.backend = "auto"
        self.last_backend: str | None = None
        self.merged = False
        self.adapters_enabled = True
        self._base = self._base_bias = None
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

        self.lora_A = parameter(r, self.in_features)
        self.lora_B = parameter(self.out_features, r)
        self.register_parameter("lora_bias", parameter(self.out_features) if lora_bias else None)
        self.register_parameter("lora_magnitude_vector", parameter(self.out_features) if use_dora else None)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew: lora_A Kaiming uniform with a = √5, the magnitude from the weight, the rest zeros."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                wide = torch.promote_types(self.weight.dtype, torch.float32)
                self.lora_magnitude_vector.copy_(torch.linalg.vector_norm(self.weight, dim=1, dtype=wide))

    def reset_parameters(self) -> None:
        """Start weight, bias and adapter anew, as after to_empty() from the meta device."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    @property
    def _divisor(self) -> float:
        return math.sqrt(self.r) if self.use_rslora else self.r

    @property
    def adapter_in_use(self) -> bool:
        """Whether forward adds the adapter's product, rather than running the linear alone."""
        return self.adapters_enabled and not self.merged

    def require_consistent(self) -> None:
        """Raises RuntimeError where the adapter is switched off and in the weight all the same."""
        if self.merged and not self.adapters_enabled:
            raise RuntimeError("adapters_enabled is False, but the adapter is merged into the weight: unmerge() first")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], as lora_linear; the linear alone where merged."""
        if self.merged or not self.adapters_enabled:
            self.require_consistent()
            return F.linear(x, self.weight, self.bias)
        own: Any = self._parameters
        bias: Tensor | None
        try:  # past nn.Module.__getattr__, which takes as long as a launch
            weight, lora_A, lora_B = own["weight"], own["lora_A"], own["lora_B"]
            bias, lora_bias = own["bias"], own["lora_bias"]
        except KeyError:  # something computes one of them, such as a parametrization
            weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
            bias, lora_bias = self.bias, self.lora_bias
        scaling = self.scaling
        if lora_bias is not None:
            bias = with_lora_bias(bias, lora_bias, scaling, weight.dtype)
        linear: Any = lora_linear
        magnitude = self.lora_magnitude_vector if self.use_dora else None
        if magnitude is not None:
            linear = partial(dora_linear, magnitude=magnitude)
        y: Tensor = linear(
            x,
            weight,
            lora_A,
            lora_B,
            bias=bias,
            scaling=scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            backend=self.backend,
        )
        if not torch.compiler.is_compiling():
            self.__dict__["last_backend"] = backends.taken()  # past nn.Module.__setattr__, which takes longer
        return y

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"lora_alpha={self.lora_alpha}"]
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.use_dora:
            parts.append("use_dora=True")
        if self.lora_bias is not None:
            parts.append("lora_bias=True")
        if isinstance(self.scaling, Tensor) or self.scaling != self.lora_alpha / self._divisor:
            parts.append(f"scaling={self.scaling}")
        if self.lora_A.dtype != self.weight.dtype:
            parts.append(f"adapter_dtype={self.lora_A.dtype}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.merged:
            parts.append("merged")
        if not self.adapters_enabled:
            parts.append("adapter off")
        return ", ".join(parts)
