"""python -m fusedlora COMMAND. A command's module is imported only when it is called."""

import argparse
import sys
from importlib import import_module

from . import __version__

# command: (module with add_arguments(parser) and run(args) -> exit status, help)
COMMANDS = {
    "doctor": ("doctor", "what this machine has, which backend a call takes, one check and one timing"),
    "demo": ("demo", "fine-tune a pretrained sentence encoder on the standard library's docstrings"),
    "tune": ("tune", "measure which kernel configurations are fastest on this GPU, for a model's shapes"),
    "build": ("cuda_build", "compile the CUDA C++ kernels for Hopper GPUs and the autograd node: both are optional"),
    "run": ("run", "run a command with PEFT's LoRA layers fused, in its child processes too"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fusedlora", description="LoRA layers in one launch each way.")
    parser.add_argument("--version", action="version", version=f"fusedlora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    runs = {}
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in argv[:1]:
            module = import_module(f".{module_name}", __package__)
            module.add_arguments(command)
            runs[name] = module.run
    args = parser.parse_args(argv)
    return runs[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
