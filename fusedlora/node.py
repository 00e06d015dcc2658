"""lora_linear's autograd node in C++, where it has been built: calls of a kind that has run once, forward and, with
gradients, backward, do without Python.

What such a call needs is told to it once: for each launch a `Recipe`, which the launchers give. A backward that no
kernels take is the op's, called from there; where activation checkpointing wants S alone that is Python's. Every other
call goes its way through Python: of a kind not seen yet, whose forward no kernels take, with a gradient for the weight
or the bias, with some of the adapter's gradients only, with scaling as a tensor, inside a graph capture, under modes,
transforms and compilers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import struct
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, dropout
from .recipe import SOURCES, Recipe, address
from .recomputation import sees_content

# The launches of a kind of call: forward without and with S, backward.
FORWARD, FORWARD_S, BACKWARD = range(3)

# run(x, weight, lora_A, lora_B, bias, dropout_p, backend, scaling) -> y, or None where Python has to take the call.
# Nothing until the node is loaded, by the first call that it might take.
run: Callable[..., Tensor | None] | None = None
_module: Any = None


@functools.cache
def load(kind: str) -> bool:
    """Whether the module is ready to run calls on devices of this kind: where it has been built, and on GPUs alone."""
    if kind != "cuda" or torch.version.hip is not None:
        return False
    from .node_build import module_path

    path = module_path()
    if not path.is_file():
        return False
    try:
        module = import_module(path)
        assert torch.__file__ is not None
        # a library's functions are those of the libraries that it is linked to, too: torch's CUDA runtime
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        driver = ctypes.CDLL("libcuda.so.1")
        functions = runtime.aoti_torch_get_current_cuda_stream, runtime.cudaStreamIsCapturing, driver.cuLaunchKernelEx
    except (ImportError, OSError, AttributeError) as error:
        warnings.warn(f"{path} cannot be loaded, calls go through Python: {error}", stacklevel=2)
        return False
    use(module, *functions, dropout.draw)
    return True


def import_module(path: Path) -> Any:
    """Raises ImportError where that is no module of this Python and torch."""
    loader = importlib.machinery.ExtensionFileLoader("fusedlora_node", str(path))
    spec = importlib.util.spec_from_file_location("fusedlora_node", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def use(module: Any, current_stream: Any, is_capturing: Any, launch_kernel: Any, draw: Callable[..., Tensor]) -> None:
    """Has the module take calls, with ctypes' functions for what it asks of CUDA."""
    global run, _module
    functions = map(address, (current_stream, is_capturing, launch_kernel))
    module.setup(*functions, vars(backends), draw, sees_content)
    _module, run = module, module.run


def add(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    backend: str,
    adapter_dtype: torch.dtype,
    plan: Any,
) -> Any:
    """A kind of call that has no launches yet, for `tell`; None where the node takes none of it.

    plan: the `PackedPlan` of these calls, whose forward kernels take.
    """
    if not load(x.device.type):
        return None
    its_plan = weakref.ref(plan)  # which holds the call

    def fill_s(*arguments: Any) -> bool:
        """S alone; whether that could be done, for which the plan must still be there."""
        plan = its_plan()
        if plan is not None:
            with torch.no_grad():
                plan.fill_s(*arguments)
        return plan is not None

    about = x, weight, lora_A, lora_B, bias, dropout_p, backend, adapter_dtype
    return _module.add(*about, plan.names, plan.backward_plan is None, fill_s)


def tell(call: Any, which: int, recipe: Recipe | None) -> None:
    """Gives the call one of its launches; without a recipe these calls stay Python's."""
    if recipe is None:
        return
    holes = (part for slot, source, offset in recipe.holes for part in (slot, SOURCES.index(source), offset))
    _module.set_launch(
        call,
        which,
        recipe.function,
        recipe.programs,
        recipe.threads,
        recipe.shared,
        recipe.early,
        recipe.problem,
        recipe.slots,
        struct.pack(f"={3 * len(recipe.holes)}q", *holes),
        (recipe.work_size, recipe.num_words, recipe.scratch_size),
        recipe.keeps,
        recipe.watchers,
    )


def forget() -> None:
    """Every kind of call."""
    if run is not None:
        _module.clear()
