"""What a process does under `python -m fusedlora run` once it has imported PEFT."""

import atexit
import os
import sys

from .peft import calls, enable


def begin() -> None:
    """Turns fusedlora on, and has the process tell at its end what was fused."""
    enable()
    atexit.register(_tell)


def _tell() -> None:
    """One line on stderr; of several ranks on a host the first one speaks."""
    if not calls or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    stock = {reason: count for reason, count in calls.items() if reason != "fused"}
    line = f"fusedlora: {calls['fused']:,} calls of PEFT's LoRA layers fused, {sum(stock.values()):,} stock"
    reasons = "".join(f"\nfusedlora:   {count:,} stock: {reason}" for reason, count in stock.items())
    print(line + reasons, file=sys.stderr)
