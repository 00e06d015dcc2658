"""python -m fusedlora run -- COMMAND: any command, with PEFT's LoRA layers fused in it and in its child processes.

The command gets one thing: fusedlora/integrations/autoload in front of its PYTHONPATH, where Python finds a
sitecustomize module. Interpreters started with -I, -E or -S read none, and stay as they are.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

AUTOLOAD = Path(__file__).parent / "integrations" / "autoload"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Example: python -m fusedlora run -- accelerate launch train.py. Every process that called PEFT's LoRA layers "
        "tells at its end, on stderr, how many calls were fused; no such line means that none was."
    )
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments")


def run(args: argparse.Namespace) -> int:
    """The command's exit status; 2 where there is no command, 127 where it is not found."""
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        print(
            "python -m fusedlora run: no command given, as in: python -m fusedlora run -- python train.py",
            file=sys.stderr,
        )
        return 2
    program = shutil.which(argv[0])
    if program is None:
        print(f"python -m fusedlora run: {argv[0]} is not found", file=sys.stderr)
        return 127
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(AUTOLOAD), environment.get("PYTHONPATH", "")) if p)
    if os.name == "nt":  # whose exec would return to the shell at once
        return subprocess.run([program, *argv[1:]], env=environment, check=False).returncode
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, argv, environment)
