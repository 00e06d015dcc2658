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
    """A few lines on stderr about the calls that were counted; of several ranks on a host the first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    compiled = "calls that torch.compile has compiled are not counted" if _compiled() else ""
    if not calls:
        if compiled:
            print(f"fusedlora: no eager call of PEFT's LoRA layers; {compiled}", file=sys.stderr)
        return
    fused = calls["fused"]
    stock = {reason: count for reason, count in calls.items() if reason != "fused"}
    line = f"fusedlora: {fused:,} {'call' if fused == 1 else 'calls'} of PEFT's LoRA layers fused, "
    line += f"{sum(stock.values()):,} stock" + (f"; {compiled}" if compiled else "")
    reasons = "".join(f"\nfusedlora:   {count:,} stock: {reason}" for reason, count in stock.items())
    print(line + reasons, file=sys.stderr)


def _compiled() -> bool:
    """Whether torch.compile has captured anything in this process, as far as its own statistics tell."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return bool(counters.get("stats", {}).get("unique_graphs"))
