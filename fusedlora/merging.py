"""Merging a LoRA layer's adapter into its weight and bias, taking it out again, and the state_dict of either."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .autocast import without_autocast
from .kept_weight import KeptWeight, merged_weight
from .layer_options import with_lora_bias


class Mergeable(nn.Linear):
    """What FusedLoRALinear is without its forward: a linear whose weight and bias may have the adapter in them."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    scaling: float | Tensor
    merged: bool
    _base: KeptWeight | None
    _base_bias: KeptWeight | None

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name: lora_A, lora_B and, where the layer has them, those of its options."""
        names = ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
        return {name: parameter for name in names if (parameter := getattr(self, name)) is not None}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · lora_B lora_A as a new tensor of W's dtype, accumulated in float32 (float64 over a float64 W).

        With use_dora its rows are scaled to the norms that lora_magnitude_vector has.

        Takes one more [out_features, in_features] in that precision while it runs.

        Raises:
            ValueError: the result has a NaN or an infinity in the weight's dtype.
            RuntimeError: the adapter is merged already, or the weight is on the meta device, sharded over ranks or
                computed by a parametrization.
        """
        weight = self._to_merge()
        with torch.inference_mode(False), without_autocast(weight):
            scaling = float(self.scaling)
            merged = merged_weight(weight, self.lora_A, self.lora_B, scaling, self.lora_magnitude_vector)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight is not finite in {weight.dtype}: not merged")
        return merged

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """bias + scaling · lora_bias as a new tensor of W's dtype; without lora_bias, bias itself. Raises likewise."""
        weight = self._to_merge()
        if self.lora_bias is None:
            return self.bias
        with torch.inference_mode(False):
            merged = with_lora_bias(self.bias, self.lora_bias, float(self.scaling), weight.dtype).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged bias is not finite in {weight.dtype}: not merged")
        return merged

    def _to_merge(self) -> Tensor:
        """The weight, once it is known to be there and to have no adapter in it."""
        weight = self.weight
        if self.merged:
            raise RuntimeError("the adapter is merged already: the weight holds it")
        if weight.is_meta:
            raise RuntimeError("weight is on the meta device: it has no numbers to merge")
        if hasattr(weight, "full_tensor"):  # fully_shard would put its own weight back, and the adapter would be lost
            raise RuntimeError(
                "weight is sharded over ranks (a DTensor): load the whole state, get_model_state_dict's with "
                "full_state_dict=True, into a model that is not sharded and merge that one"
            )
        for name in ("weight", "bias"):  # which would be computed again over the merged one
            if name not in self._parameters:
                raise RuntimeError(
                    f"{name} is no Parameter: something computes it, such as a parametrization; remove that first"
                )
        return weight

    def merge(self, keep_base: Literal["cpu", "device", False] = "cpu") -> Self:
        """Put W + scaling · lora_B lora_A in W's place, so that forward is one plain linear; returns the layer.

        W itself is not written to: another module that shares it keeps it as it is. Does nothing where merged already.
        With lora_bias the bias is replaced likewise, and a layer without one gets one until unmerge().

        Args:
            keep_base: where W waits for unmerge(). "cpu" holds a copy in the host's memory (the weight itself where it
                lies there) and frees the device's, unless someone else holds W; "device" leaves W where it is, so the
                layer takes two weights' memory; False drops it, and unmerge() raises.

        Merging itself takes up to two more weights in float32 for a moment.

        Raises:
            ValueError: keep_base is something else, or the merged weight has a NaN or an infinity.
            RuntimeError: the weight is on the meta device, sharded over ranks or computed by a parametrization.

        On an error the layer is as it was.
        """
        if keep_base is not False and keep_base not in ("cpu", "device"):
            raise ValueError(f'keep_base is {keep_base!r}, must be "cpu", "device" or False')
        if self.merged:
            return self
        base = self.weight
        bias: nn.Parameter | None = self.bias
        merged = nn.Parameter(self.merged_weight(), requires_grad=base.requires_grad)
        merged_bias = self.merged_bias()
        kept = kept_bias = None
        if keep_base is not False:
            kept = KeptWeight(base, keep_base)
            if self.lora_bias is not None and bias is not None:
                kept_bias = KeptWeight(bias, keep_base)
        if self.lora_bias is not None:
            assert merged_bias is not None
            self.bias = nn.Parameter(merged_bias, requires_grad=bias is not None and bias.requires_grad)
        self.weight = merged
        self._base, self._base_bias = kept, kept_bias
        self.merged = True
        return self

    def unmerge(self) -> Self:
        """Put back the weight and the bias of before merge(), bit for bit; returns the layer.

        Does nothing where not merged. It is the same Parameter wherever someone still holds it. Where the layer was
        moved or cast in between, it goes along.

        Raises:
            RuntimeError: merge(keep_base=False) dropped it.
        """
        if not self.merged:
            return self
        if self._base is None:
            raise RuntimeError("the base weight was not kept: it was merged with keep_base=False")
        self.weight = self._base.restore(self.weight)
        if self.lora_bias is not None:
            self.bias = None if self._base_bias is None else self._base_bias.restore(self.weight)  # type: ignore[assignment]
        self._base = self._base_bias = None
        self.merged = False
        return self

    @property
    def base_bias(self) -> Tensor | None:
        """The bias without lora_bias, merged or not. Raises RuntimeError where merge(keep_base=False) dropped it."""
        if not self.merged or self.lora_bias is None:
            return self.bias
        if self._base is None:
            raise RuntimeError("the base bias was not kept: it was merged with keep_base=False")
        return None if self._base_bias is None else self._base_bias.weight

    @property
    def can_unmerge(self) -> bool:
        """Whether unmerge() would succeed: the layer is not merged, or its base weight was kept."""
        return not self.merged or self._base is not None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for kept in (self._base, self._base_bias):
            if kept is not None and kept.keep == "device":
                with torch.no_grad():
                    kept.move(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """weight, bias and the adapter. Merged makes no difference where the base was kept: both are the base's.

        Where it was not kept the adapter cannot be told from the weight any more, so only weight and bias are there.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base is not None:
            for name, kept in (("weight", self._base), ("bias", self._base_bias)):
                if kept is not None:
                    base = kept.weight.to(self.weight.dtype)
                    destination[prefix + name] = base if keep_vars else base.detach()
            if self.lora_bias is not None and self._base_bias is None:
                del destination[f"{prefix}bias"]
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
