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
        "Example: python -m fusedlora run -- accelerate launch train.py. On each host, the first process (local rank "
        "0) that has called PEFT's LoRA layers tells at its end, on stderr, how many eager calls were fused; calls "
        "that torch.compile has compiled are not counted."
    )
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments")


def run(args: argparse.Namespace) -> int:
    """The command's exit status; 2 where there is no command, 127 where it is not found, 126 where it can't be run."""
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        print(
            "python -m fusedlora run: no command given, as in: python -m fusedlora run -- python train.py",
            file=sys.stderr,
        )
        return 2
    program = shutil.which(argv[0])
    if program is None:
        if os.path.dirname(argv[0]) and os.path.exists(argv[0]):
            return _cannot_run(argv[0], "it is a folder" if os.path.isdir(argv[0]) else "permission denied")
        print(f"python -m fusedlora run: {argv[0]} is not found", file=sys.stderr)
        return 127
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(AUTOLOAD), environment.get("PYTHONPATH", "")) if p)
    if os.name == "nt":  # whose exec would return to the shell at once
        return subprocess.run([program, *argv[1:]], env=environment, check=False).returncode
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, argv, environment)
    except OSError as error:  # such as a script without its #! line
        return _cannot_run(program, str(error.strerror))


def _cannot_run(program: str, reason: str) -> int:
    print(f"python -m fusedlora run: {program} cannot be run: {reason}", file=sys.stderr)
    return 126
