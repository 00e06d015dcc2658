"""Types of the commands' arguments, for argparse: a misfit is one line and exit status 2, before anything has run."""

import argparse
import math
import re
from collections.abc import Callable


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Of a whole number within these bounds."""
    rule = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
        return value

    return parse


def integers(text: str) -> list[int]:
    """One or more whole numbers of at least 1, separated by commas."""
    try:
        return [integer(1)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one or more whole numbers of at least 1, as 16 or 8,16,64"
        ) from None


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0.0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def device(text: str) -> str:
    """A device's name as torch spells them; whether it is there is known only to torch."""
    if re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device such as cpu, cuda or cuda:1")
    return text


def missing_gpu(device: str) -> str | None:
    """Why torch can't use this cuda device, in words; None where it can, or where it is of another kind."""
    import torch

    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) < count:
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"there is no {device}: this torch is a CPU build"
    return f"there is no {device}: this torch can use {count or 'no'} GPU{'s' * (count != 1)}"
