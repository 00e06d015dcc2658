"""FusedLoRALinear: an nn.Linear with a LoRA adapter."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import lora_linear


class FusedLoRALinear(nn.Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False,
                    adapter_dtype=None) -> "FusedLoRALinear":
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.train(linear.training)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        return layer

    def _add_adapter(self, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype) -> None:
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.backend = "auto"
        self.last_backend: str | None = None
        self.merged = False
        self.adapters_enabled = True
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=adapter_dtype))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.adapters_enabled:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.bias,
            scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training, backend=self.backend,
        )
