"""fusedlora as a plugin of axolotl, to be named in its YAML file:

    plugins:
      - fusedlora.integrations.axolotl.FusedLoRAPlugin
    lora_mlp_kernel: false
    lora_qkv_kernel: false
    lora_o_kernel: false

axolotl's own LoRA kernels read the weights past PEFT's layers; it turns them on by itself where the file says nothing.
"""

from typing import Any

OWN_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
UNSLOTH = ("unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o")


def _make_plugin() -> type:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError as error:
        raise ImportError("fusedlora.integrations.axolotl.FusedLoRAPlugin needs axolotl, which is not there") from error

    class FusedLoRAPlugin(BasePlugin):  # type: ignore[misc]
        """Fuses PEFT's LoRA layers in axolotl's runs, and tells before training what is fused.

        Raises ValueError where LoRA kernels of axolotl's own, or unsloth's, are on: they would pass PEFT's layers by.
        """

        def pre_model_load(self, cfg: Any) -> None:
            clash = [name for name in (*OWN_KERNELS, *UNSLOTH) if cfg.get(name)]
            if clash:
                lines = "\n".join(f"{name}: false" for name in clash)
                raise ValueError(
                    f"these LoRA kernels are on and would pass fusedlora's by; put into the YAML file:\n{lines}"
                )
            from .peft import enable

            enable()

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            from .peft import report

            print(report(trainer.model))

    FusedLoRAPlugin.__module__, FusedLoRAPlugin.__qualname__ = __name__, "FusedLoRAPlugin"
    return FusedLoRAPlugin


def __getattr__(name: str) -> Any:
    """FusedLoRAPlugin, made when it is first asked for: its base class is axolotl's."""
    if name != "FusedLoRAPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plugin = globals()[name] = _make_plugin()
    return plugin
