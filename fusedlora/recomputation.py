"""Where activation checkpointing computes a forward again, and stops it once it has what backward reads.

torch.utils.checkpoint without reentrance keeps what is saved then, and raises when the last tensor is. That may be S of
a block's last LoRA linear, and who saves before it computes need not compute y any more.
"""

from typing import Any

import torch

# Private to torch. Without it nothing is known to be under way, and y is computed.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def sees_content(pack: Any) -> bool:
    """Whether this hook, which packs saved tensors, may look into them: any may but checkpointing's own."""
    name = getattr(pack, "__module__", None), getattr(pack, "__qualname__", None)
    return name != ("torch.utils.checkpoint", "_recomputation_hook.__init__.<locals>.pack_hook")


def is_under_way() -> bool:
    """Whether what this thread saves now goes to such a hook."""
    hooks = _top_hooks(True)
    return hooks is not None and not sees_content(hooks[0])
