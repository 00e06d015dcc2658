"""FusedLoRALinear: an nn.Linear with a LoRA adapter, its merging and its state_dict."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .dora import dora_linear
from .functional import lora_linear
from .kept_weight import KeptWeight, merged_weight


class FusedLoRALinear(nn.Linear):
    """y = x Wᵀ + bias + scaling · dropout(x) lora_Aᵀ lora_Bᵀ, W and bias frozen.

    scaling is lora_alpha / r, or lora_alpha / √r with use_rslora (Kalajdzievski, "A Rank Stabilization Scaling Factor
    for Fine-Tuning with LoRA", 2023). As in PEFT lora_A starts Kaiming uniform with a = √5 and lora_B as zeros, so that
    the layer starts as its linear.

    With use_dora y = g ∘ (x Wᵀ + scaling · x lora_Aᵀ lora_Bᵀ) + bias, where g = lora_magnitude_vector / ‖W + scaling ·
    lora_B lora_A‖ for each output (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024); see dora_linear.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear, in its order.
        r: rank, at least 1.
        lora_alpha: numerator of scaling.
        lora_dropout: rate of the dropout on the adapter's x while training, in [0, 1).
        use_rslora: divide lora_alpha by √r.
        use_dora: train the norms of the weight's rows by themselves.
        adapter_dtype: dtype of the adapter, the weight's or float32. None is float32 over a 16-bit weight, as in
            PEFT, and the weight's dtype over any other.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen here; where one is made to require a
            gradient again, it gets it.
        lora_A [r, in_features], lora_B [out_features, r]: the adapter.
        lora_magnitude_vector [out_features]: belongs to it with use_dora, else None. It starts as the norms of the rows
            that the weight has then: where the weight comes later, as from the meta device or from a plain linear's
            state dict, call reset_lora_parameters() after it.
        scaling: the factor itself, free to set.
        backend: "auto", or the name of the backend to insist on.
        last_backend: the one that the latest call took, None before it and under torch.compile.
        merged: whether the adapter is in the weight now.
        adapters_enabled: False runs the linear alone; where the adapter is merged, forward then raises RuntimeError.

    Raises TypeError and ValueError for arguments outside these rules.
    """

    weight: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    _base: KeptWeight | None

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
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(f"bias is {bias!r}, must be True or False: whether the layer has one")
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype)

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
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype)
        return layer.train(linear.training)

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        weight = self.weight
        if not isinstance(r, int) or isinstance(r, bool):
            raise TypeError(f"r is {r!r}, must be an integer")
        if r < 1:
            raise ValueError(f"r is {r}, must be at least 1")
        for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, must be a number")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}, must be finite")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {lora_dropout}, must be in [0, 1)")
        for name, flag in (("use_rslora", use_rslora), ("use_dora", use_dora)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r}, must be True or False")
        if not weight.is_floating_point():
            raise TypeError(f"weight has dtype {weight.dtype}, must be floating point")
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        elif adapter_dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"adapter_dtype is {adapter_dtype}, must be the weight's {weight.dtype} or torch.float32")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.backend = "auto"
        self.last_backend: str | None = None
        self.merged = False
        self.adapters_enabled = True
        self._base = None
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=weight.device, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=weight.device, dtype=adapter_dtype))
        magnitude = torch.empty(self.out_features, device=weight.device, dtype=adapter_dtype) if use_dora else None
        self.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew: lora_A Kaiming uniform with a = √5, lora_B zeros, the magnitude from the weight."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                wide = torch.promote_types(self.weight.dtype, torch.float32)
                self.lora_magnitude_vector.copy_(torch.linalg.vector_norm(self.weight, dim=1, dtype=wide))

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name: lora_A, lora_B and, with use_dora, lora_magnitude_vector."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            named["lora_magnitude_vector"] = self.lora_magnitude_vector
        return named

    def reset_parameters(self) -> None:
        """Start weight, bias and adapter anew, as after to_empty() from the meta device."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    @property
    def adapter_in_use(self) -> bool:
        """Whether forward adds the adapter's product, rather than running the linear alone."""
        return self.adapters_enabled and not self.merged

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], as lora_linear; the linear alone where merged."""
        if self.merged or not self.adapters_enabled:
            if self.merged and not self.adapters_enabled:
                raise RuntimeError(
                    "adapters_enabled is False, but the adapter is merged into the weight: unmerge() first"
                )
            return F.linear(x, self.weight, self.bias)
        linear: Callable[..., Tensor] = dora_linear if self.use_dora else lora_linear
        y = linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            *((self.lora_magnitude_vector,) if self.use_dora else ()),
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            backend=self.backend,
        )
        if not torch.compiler.is_compiling():
            self.__dict__["last_backend"] = backends.last_used  # past nn.Module.__setattr__, which takes longer
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · lora_B lora_A as a new tensor of W's dtype, accumulated in float32 (float64 over a float64 W).

        With use_dora its rows are scaled to the norms that lora_magnitude_vector has.

        Takes one more [out_features, in_features] in that precision while it runs.

        Raises:
            ValueError: the result has a NaN or an infinity in the weight's dtype.
            RuntimeError: the adapter is merged already, or the weight is on the meta device or sharded over ranks.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already: the weight holds it")
        weight = self.weight
        if weight.is_meta:
            raise RuntimeError("weight is on the meta device: it has no numbers to merge")
        if hasattr(weight, "full_tensor"):  # fully_shard would put its own weight back, and the adapter would be lost
            raise RuntimeError(
                "weight is sharded over ranks (a DTensor): load the whole state, get_model_state_dict's with "
                "full_state_dict=True, into a model that is not sharded and merge that one"
            )
        with torch.inference_mode(False), backends.without_autocast(weight):
            merged = merged_weight(weight, self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight is not finite in {weight.dtype}: not merged")
        return merged

    def merge(self, keep_base: Literal["cpu", "device", False] = "cpu") -> Self:
        """Put W + scaling · lora_B lora_A in W's place, so that forward is one plain linear; returns the layer.

        W itself is not written to: another module that shares it keeps it as it is. Does nothing where merged already.

        Args:
            keep_base: where W waits for unmerge(). "cpu" holds a copy in the host's memory (the weight itself where it
                lies there) and frees the device's, unless someone else holds W; "device" leaves W where it is, so the
                layer takes two weights' memory; False drops it, and unmerge() raises.

        Merging itself takes up to two more weights in float32 for a moment.

        Raises:
            ValueError: keep_base is something else, or the merged weight has a NaN or an infinity.
            RuntimeError: the weight is on the meta device or sharded over ranks.
        """
        if keep_base is not False and keep_base not in ("cpu", "device"):
            raise ValueError(f'keep_base is {keep_base!r}, must be "cpu", "device" or False')
        if self.merged:
            return self
        base = self.weight
        merged = nn.Parameter(self.merged_weight(), requires_grad=base.requires_grad)
        if keep_base is not False:
            self._base = KeptWeight(base, keep_base)
        self.weight = merged
        self.merged = True
        return self

    def unmerge(self) -> Self:
        """Put back the weight of before merge(), bit for bit; returns the layer. Does nothing where not merged.

        It is the same Parameter wherever someone still holds it. Where the layer was moved or cast in between, the
        weight goes along.

        Raises:
            RuntimeError: merge(keep_base=False) dropped it.
        """
        if not self.merged:
            return self
        if self._base is None:
            raise RuntimeError("the base weight was not kept: it was merged with keep_base=False")
        self.weight = self._base.restore(self.weight)
        self._base = None
        self.merged = False
        return self

    @property
    def can_unmerge(self) -> bool:
        """Whether unmerge() would succeed: the layer is not merged, or its base weight was kept."""
        return not self.merged or self._base is not None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._base is not None and self._base.keep == "device":
            with torch.no_grad():
                self._base.move(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """weight, bias and the adapter. Merged makes no difference where the base was kept: the weight is the base's.

        Where it was not kept the adapter cannot be told from the weight any more, so only weight and bias are there.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base is not None:
            base = self._base.weight.to(self.weight.dtype)
            destination[f"{prefix}weight"] = base if keep_vars else base.detach()
        else:
            for name in self.adapter_parameters:
                del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also takes a plain nn.Linear's: with nothing of the adapter there, it stays as it is."""
        adapter = [prefix + name for name in self.adapter_parameters]
        plain = not any(key in state_dict for key in adapter)
        if self.merged and not (plain and self._base is None):
            remedy = "unmerge() first" if self.can_unmerge else "its base was not kept, so only a plain linear's loads"
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'} is merged: {remedy}")
            return
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if not (plain and key in adapter)]

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"lora_alpha={self.lora_alpha}"]
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.use_dora:
            parts.append("use_dora=True")
        if self.lora_A.dtype != self.weight.dtype:
            parts.append(f"adapter_dtype={self.lora_A.dtype}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.merged:
            parts.append("merged")
        if not self.adapters_enabled:
            parts.append("adapter off")
        return ", ".join(parts)
