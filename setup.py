"""Everything is declared in pyproject.toml, but that FUSEDLORA_BUILD_CUDA=1 compiles csrc into the package.

The wheel is then one for this kind of machine, for any Python and torch. An editable install has its library in the
user's cache: `python -m fusedlora build`.
"""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            print("FUSEDLORA_BUILD_CUDA: an editable install has no library of its own, run python -m fusedlora build")
            return
        # by its path: an isolated build does not find the package
        spec = spec_from_file_location("cuda_build", Path(__file__).parent / "fusedlora/cuda_build.py")
        cuda_build = module_from_spec(spec)
        spec.loader.exec_module(cuda_build)
        try:
            cuda_build.build_into(Path(self.build_lib, "fusedlora", cuda_build.LIBRARY), print)
        except cuda_build.BuildError as error:
            raise SystemExit(f"FUSEDLORA_BUILD_CUDA=1: {error}") from None


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if os.environ.get("FUSEDLORA_BUILD_CUDA") == "1":
    # ninja is found on PATH or brought here
    commands = {"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}
    setup(distclass=WithLibrary, cmdclass=commands, setup_requires=["ninja"])
else:
    setup()
