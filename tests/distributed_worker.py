"""One rank of the tests in test_distributed.py: `python -P distributed_worker.py FAMILY RANK WORLD_SIZE FOLDER`.

Runs the cases of distributed_FAMILY.py in their order, every rank each of them, and writes what came of them to
FOLDER/RANK.json: None, or the traceback. Ends at the first failure, since the ranks may be out of step after it. NCCL
with a GPU for each rank where there are enough, else gloo on the CPU.
"""

import copy
import datetime
import functools
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, apply_lora
from fusedlora.parallel import ColwiseLoRA, RowwiseLoRA

SIZE = 16  # rows of the whole batch
CASES: dict[str, Callable[[], None]] = {}
ON_GPU = torch.cuda.device_count() >= 2
DEVICE = "cuda" if ON_GPU else "cpu"
# The widest dtype that the kernels take by themselves, or one in which sums in another order agree to twelve digits.
DTYPE = torch.bfloat16 if ON_GPU else torch.float64
CLOSE = 2e-2 if ON_GPU else 1e-9
PLAN = {"*.up": ColwiseLoRA(), "*.down": RowwiseLoRA()}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class MLP(nn.Sequential):
    """Two blocks; sizes that two ranks can divide and, in bf16, the kernels take."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__(Block(width, hidden), Block(width, hidden))


def tiny_llama() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )


def adapted(model: nn.Module, dtype: torch.dtype = DTYPE, **options: object) -> nn.Module:
    """`model` on the device with adapters whose lora_B is not zero: at zero dA vanishes."""
    options = {"r": 4, "lora_alpha": 8, "adapter_dtype": dtype, **options}
    model = apply_lora(model.to(DEVICE, dtype), "all-linear", **options)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B.normal_(std=0.3)
    return model


def layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (dist.get_world_size(),), mesh_dim_names=("tp",))


def sharded_pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """(sharded, single): an MLP whose blocks are cut by column and row, and the same one whole."""
    single = adapted(MLP(), **options)
    return parallelize_module(copy.deepcopy(single), mesh(), PLAN), single


def one_layer(in_features: int = 32, out_features: int = 48, **options: object) -> FusedLoRALinear:
    made = FusedLoRALinear(in_features, out_features, device=DEVICE, dtype=DTYPE, r=4, adapter_dtype=DTYPE, **options)
    nn.init.normal_(made.lora_B, std=0.3)
    return made


def batches(steps: int = 3, dtype: torch.dtype = DTYPE) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, target), the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x, target = (torch.randn(SIZE, 3, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
        yield x, target


def part(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # AdamW's first steps go by the sign of a gradient, which for a small one is noise in bf16.
    return torch.optim.SGD(trained, lr=0.05) if ON_GPU else torch.optim.AdamW(trained, lr=0.01)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def every_rank(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def assert_close(name: str, found: Tensor, expected: Tensor, limit: float = CLOSE, exact: Tensor | None = None) -> None:
    """By the norm of the difference over that of `expected`; with `exact`, three times the error of `expected` more."""
    assert found.shape == expected.shape, f"{name} is {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{name} is {found.dtype}, not {expected.dtype}"
    error, size = (found.double() - expected.double()).norm(), expected.double().norm()
    noise = 0.0 if exact is None else (expected.double() - exact).norm()
    assert error <= limit * size + 3 * noise, f"{name} is off by {error:.1e} of {size:.1e}, the noise being {noise:.1e}"


def assert_same_training(
    model: nn.Module, single: nn.Module, limit: float = CLOSE, exact: nn.Module | None = None
) -> None:
    """Gradients and parameters of `model`, gathered, are those of `single`; some gradient is there.

    `exact` is `single` trained in float64, where what a dtype's noise does is not known beforehand.
    """
    names = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    exact_parameters = {} if exact is None else dict(exact.named_parameters())
    compared = 0
    for name, expected in single.named_parameters():
        found = names.pop(name)
        true = exact_parameters.get(name)
        assert found.requires_grad == expected.requires_grad, name
        assert (found.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert_close(f"{name}.grad", whole(found.grad), expected.grad, limit, None if true is None else true.grad)
            compared += 1
        assert_close(name, whole(found.detach()), expected.detach(), limit, None if true is None else true.detach())
    assert not names and compared >= max(1, 2 * len(layers(single))), compared
    for name, layer in layers(model).items():
        assert layer.last_backend == ("triton" if ON_GPU else "reference"), name


def assert_trains_alike(parallel: nn.Module, single: nn.Module) -> None:
    """Each rank's half of every batch through `parallel`, the whole batch through `single`."""
    steps = [optimizer_of(model) for model in (parallel, single)]
    for x, target in batches():
        for optimizer in steps:
            optimizer.zero_grad()
        loss = F.mse_loss(parallel(part(x)), part(target))
        expected = F.mse_loss(single(x), target)
        loss.backward()
        expected.backward()
        for optimizer in steps:
            optimizer.step()
        assert_close("loss", mean_over_ranks(loss), expected.detach())
        assert_same_training(parallel, single)


def main(family: str, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if ON_GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if ON_GPU else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    spec = importlib.util.spec_from_file_location(family, Path(__file__).with_name(f"distributed_{family}.py"))
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    results: dict[str, str | None] = {}
    for name, function in CASES.items():
        if "llama" in name and importlib.util.find_spec("transformers") is None:
            continue
        torch.manual_seed(0)
        try:
            function()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name] is not None:
            os._exit(1)  # the other ranks wait in a collective, and so would leaving the group
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past the destructors of torch's threads, one of which now and then aborts the process


if __name__ == "__main__":
    sys.modules["distributed_worker"] = sys.modules["__main__"]  # under which the cases import it
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
