"""Tensor parallelism: styles for torch's parallelize_module that shard a FusedLoRALinear over a device mesh.

    mesh = init_device_mesh("cuda", (2,))
    parallelize_module(block, mesh, {"up_proj": ColwiseLoRA(), "down_proj": RowwiseLoRA()})

With W_i, A_i, B_i, b_i and x_i the part of rank i, and d a dropout mask:

    ColwiseLoRA   y_i = x W_iᵀ + s · d(x) Aᵀ B_iᵀ + b_i      dx = Σ dx_i, dA = Σ dA_i      y is the y_i side by side
    RowwiseLoRA   y = Σ (x_i W_iᵀ + s · d_i(x_i) A_iᵀ Bᵀ) + b       dB = Σ dB_i

The two cuts of W are those of Shoeybi et al., "Megatron-LM" (2019). torch's own ColwiseParallel would also cut lora_A,
along the rank. The kernels see plain local tensors; nothing but the sums above is sent.

Dropout takes its masks from torch's generator, as without a mesh. ColwiseLoRA needs one mask on all ranks, so their
generators must be in one state: call torch.manual_seed with one seed on every rank of the mesh. RowwiseLoRA gives each
rank masks of its own and leaves the generators as far advanced as each other.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from . import backends
from .functional import lora_linear
from .layer_options import with_lora_bias
from .linear import FusedLoRALinear
from .rank_masks import own_stream, require_one_generator

__all__ = ["ColwiseLoRA", "ParallelLoRALinear", "RowwiseLoRA"]


class _LoRAStyle(ParallelStyle):
    """What the two styles share: their options, the checks, and the change of the module's parameters and class."""

    placements: ClassVar[dict[str, Placement]]  # of each parameter
    summed: ClassVar[str]  # the replicated parameter whose gradient is partial on each rank
    cut: ClassVar[str]  # the width that the mesh divides
    x_layout: ClassVar[Placement]  # of x and y where the layer computes
    y_layout: ClassVar[Placement]
    default_output: ClassVar[Placement]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or self.x_layout,)
        self.output_layouts = (output_layouts or self.default_output,)
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        options = f"input_layouts={self.input_layouts}, output_layouts={self.output_layouts}"
        return f"{type(self).__name__}({options}, use_local_output={self.use_local_output})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        me = type(self).__name__
        if not isinstance(module, FusedLoRALinear):
            raise TypeError(f"module is a {type(module).__name__}, {me} takes a FusedLoRALinear")
        if type(module) is not FusedLoRALinear:
            raise TypeError(
                f"module is a {type(module).__name__}, {me} takes exactly a FusedLoRALinear, before fully_shard"
            )
        if unknown := [name for name, _ in module.named_parameters() if name not in self.placements]:
            raise TypeError(f"module has the parameters {', '.join(unknown)}, which {me} cannot shard")
        if "forward" in module.__dict__:
            raise TypeError(f"module.forward was replaced, as accelerate's hooks do, and {me} would not take effect")
        if module.merged:
            raise RuntimeError(f"the adapter is merged into the weight: unmerge() before {me}")
        if device_mesh.ndim != 1:
            raise ValueError(f'device_mesh has {device_mesh.ndim} dimensions, must have one: slice it, as mesh["tp"]')
        width, ranks = getattr(module, self.cut), device_mesh.size()
        if width % ranks:
            raise ValueError(f"{self.cut} is {width}, must be a multiple of the mesh's {ranks} ranks")
        for name, parameter in list(module.named_parameters()):
            sharded = distribute_tensor(
                parameter, device_mesh, [self.placements[name]], src_data_rank=self.src_data_rank
            )
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        module.__class__ = ParallelLoRALinear
        module.__dict__["_style"] = self
        return module

    def take(self, x: Tensor, in_features: int, mesh: DeviceMesh) -> Tensor:
        """The local x to compute with; a replicated one's gradient, which each rank has a part of, is summed."""
        replicated = self.x_layout == Replicate()
        if not isinstance(x, DTensor) and self.input_layouts == (self.x_layout,):  # no need of DTensor's host time
            features = x.shape[-1] * (1 if replicated else mesh.size())
            local: Tensor = _SumGradient.apply(x, mesh) if replicated and x.requires_grad else x
        else:
            given = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
            features = given.shape[-1]
            partial = (Partial(),) if replicated else None
            local = given.redistribute(placements=(self.x_layout,)).to_local(grad_placements=partial)
        if features != in_features:
            raise ValueError(
                f"x has {features} features over the mesh, must have in_features {in_features}: is input_layouts "
                f"{self.input_layouts} right?"
            )
        return local

    def give(self, y: Tensor, mesh: DeviceMesh) -> Tensor:
        """The local y in output_layouts."""
        if self.use_local_output and self.output_layouts == (self.default_output,):
            return _Sum.apply(y, mesh) if self.y_layout == Partial() else y
        whole = DTensor.from_local(y, mesh, (self.y_layout,), run_check=False)
        whole = whole.redistribute(placements=self.output_layouts)
        return whole.to_local() if self.use_local_output else whole

    def local_bias(self, bias: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
        """Of the bias for this rank's columns, what this rank's kernel adds."""
        return bias

    def masks(self, layer: ParallelLoRALinear, device: torch.device, mesh: DeviceMesh) -> Any:
        """A context in which the generator of `device` draws the mask that this rank needs."""
        raise NotImplementedError


class ColwiseLoRA(_LoRAStyle):
    """Cuts a FusedLoRALinear along out_features: weight, lora_B and both biases Shard(0), lora_A replicated.

    Where lora_A is trained each rank has the gradient of its own columns, and the sum over the mesh goes into
    lora_A.grad on every rank. One dropout mask on all ranks: where their generators are in different states, the first
    forward that draws a mask raises RuntimeError.

    Args:
        input_layouts: placement of x; default Replicate(), as torch's ColwiseParallel takes it.
        output_layouts: placement of y; default Shard(-1), every rank having its columns.
        use_local_output: return y as a plain tensor, this rank's part, instead of a DTensor.

    parallelize_module raises TypeError where the module is not exactly a FusedLoRALinear or has other parameters,
    RuntimeError where it is merged, and ValueError where the mesh has more than one dimension or doesn't divide
    out_features.
    """

    placements = {
        "weight": Shard(0),
        "lora_A": Replicate(),
        "lora_B": Shard(0),
        "bias": Shard(0),
        "lora_bias": Shard(0),
    }
    summed, cut = "lora_A", "out_features"
    x_layout, y_layout, default_output = Replicate(), Shard(-1), Shard(-1)

    def masks(self, layer: ParallelLoRALinear, device: torch.device, mesh: DeviceMesh) -> Any:
        if not layer._generators_agree and not torch.compiler.is_compiling():
            require_one_generator(device, mesh)
            layer.__dict__["_generators_agree"] = True
        return nullcontext()


class RowwiseLoRA(_LoRAStyle):
    """Cuts a FusedLoRALinear along in_features: weight and lora_A Shard(1), lora_B and both biases replicated.

    Each rank's y is partial: summed over the mesh, or by reduce-scatter into a sharded output_layouts; the biases are
    added once. The gradient of lora_B is summed over the mesh. Every rank drops other columns of x, so each has masks
    of its own, the same again when activation checkpointing computes the layer a second time. They cannot be drawn
    under torch.compile, which runs such a layer eagerly and with fullgraph=True raises, nor in a CUDA graph's capture,
    where RuntimeError is raised.

    Args:
        input_layouts: placement of x; default Shard(-1), as torch's RowwiseParallel takes it.
        output_layouts: placement of y; default Replicate().
        use_local_output: return y as a plain tensor, this rank's part, instead of a DTensor.

    parallelize_module raises as for ColwiseLoRA, with in_features in place of out_features.
    """

    placements = {
        "weight": Shard(1),
        "lora_A": Shard(1),
        "lora_B": Replicate(),
        "bias": Replicate(),
        "lora_bias": Replicate(),
    }
    summed, cut = "lora_B", "in_features"
    x_layout, y_layout, default_output = Shard(-1), Partial(), Replicate()

    def local_bias(self, bias: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
        if bias is None or mesh.get_local_rank() == 0:
            return bias
        # Zeros that hand their gradient on: dy is whole on every rank, and so is the gradient that each finds.
        return bias - bias.detach() if bias.requires_grad else None

    def masks(self, layer: ParallelLoRALinear, device: torch.device, mesh: DeviceMesh) -> Any:
        return own_stream(device, mesh.get_local_rank())


class ParallelLoRALinear(FusedLoRALinear):
    """A FusedLoRALinear after ColwiseLoRA or RowwiseLoRA: its parameters are DTensors, its kernels see local parts.

    in_features and out_features stay those of the whole layer. merge() raises RuntimeError.
    """

    _style: _LoRAStyle
    _generators_agree = False

    def forward(self, x: Tensor) -> Tensor:
        """x in the style's input_layouts, a DTensor or this rank's part -> y in its output_layouts.

        Raises ValueError where x does not have in_features over the mesh, and as lora_linear.
        """
        style = self._style
        mesh: DeviceMesh = self.weight.device_mesh  # type: ignore[attr-defined]
        return style.give(self._local_forward(style.take(x, self.in_features, mesh), mesh), mesh)

    def _local_forward(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        style = self._style
        weight = self._local("weight", mesh)
        bias = None if self._parameters["bias"] is None else self._local("bias", mesh)
        if not self.adapters_enabled:
            return F.linear(x, weight, style.local_bias(bias, mesh))
        if self._parameters["lora_bias"] is not None:
            bias = with_lora_bias(bias, self._local("lora_bias", mesh), self.scaling, weight.dtype)
        bias = style.local_bias(bias, mesh)
        masked = self.training and self.lora_dropout > 0.0
        with style.masks(self, x.device, mesh) if masked else nullcontext():
            y = lora_linear(
                x,
                weight,
                self._local("lora_A", mesh),
                self._local("lora_B", mesh),
                bias,
                scaling=self.scaling,
                dropout_p=self.lora_dropout,
                training=self.training,
                backend=self.backend,
            )
        if not torch.compiler.is_compiling():
            self.__dict__["last_backend"] = backends.taken()
        return y

    def _local(self, name: str, mesh: DeviceMesh) -> Tensor:
        parameter: Any = self._parameters[name]
        local: Tensor = parameter.to_local()
        return _SumGradient.apply(local, mesh) if name == self._style.summed and local.requires_grad else local

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {type(self._style).__name__} over {self.weight.device_mesh.size()} ranks"  # type: ignore[attr-defined]


class _SumGradient(torch.autograd.Function):
    """A tensor that all ranks have, as it is; its gradient, of which each finds a part, summed over the mesh."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.mesh), None


class _Sum(torch.autograd.Function):
    """The sum over the mesh; its gradient, which all ranks have, as it is."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh) -> Tensor:
        return _sum(local, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _sum(local: Tensor, mesh: DeviceMesh) -> Tensor:
    partial = DTensor.from_local(local, mesh, (Partial(),), run_check=False)
    return partial.redistribute(placements=(Replicate(),)).to_local()
