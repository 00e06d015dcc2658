"""Found by Python before every script under `python -m fusedlora run`: turns fusedlora on once PEFT is imported.

Its folder leads PYTHONPATH there, which child processes inherit. Python imports one sitecustomize only, so the one that
it would have found without this folder is run from here. Nothing else is imported until the process imports PEFT.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _after_peft() -> None:
    try:
        from fusedlora.integrations.peft_run import begin
    except ModuleNotFoundError as error:
        if error.name != "fusedlora":
            raise
        raise ImportError(
            f"python -m fusedlora run: {sys.executable} has peft, but no fusedlora, and would run PEFT unchanged"
        ) from error
    begin()


class _Finder:
    """Finds PEFT as the other finders do, and has its loader turn fusedlora on behind it."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _extend(spec.loader)
                return spec
        return None


def _extend(loader):  # type: ignore[no-untyped-def]
    execute = loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]
        execute(module)
        _after_peft()

    loader.exec_module = exec_module


def _run_the_next() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
_run_the_next()
