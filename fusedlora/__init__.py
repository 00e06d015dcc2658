"""LoRA linear layers in one launch forward and one launch backward.

Names are imported on first use: importing the package loads neither triton nor a GPU driver.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_adapter as load_adapter
    from .checkpoint import save_adapter as save_adapter
    from .dora import dora_linear as dora_linear
    from .explanation import explain as explain
    from .functional import lora_linear as lora_linear
    from .linear import FusedLoRALinear as FusedLoRALinear
    from .model import apply_lora as apply_lora
    from .model import lora_parameters as lora_parameters
    from .model import merge_and_unload as merge_and_unload
    from .model import merge_lora as merge_lora
    from .model import report as report
    from .model import unmerge_lora as unmerge_lora

__version__ = "0.1.0"

_HOME = {
    "lora_linear": "functional",
    "dora_linear": "dora",
    "FusedLoRALinear": "linear",
    "explain": "explanation",
    "apply_lora": "model",
    "report": "model",
    "merge_lora": "model",
    "unmerge_lora": "model",
    "merge_and_unload": "model",
    "lora_parameters": "model",
    "save_adapter": "checkpoint",
    "load_adapter": "checkpoint",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
