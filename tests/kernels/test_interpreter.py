"""Runs the kernels' tests in Triton's interpreter, which has to be switched on before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")


# by version, since a failure of the kernels there must not pass for one of numpy
BROKEN = triton.__version__ < "3.9" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter already")
@pytest.mark.skipif(BROKEN, reason="the interpreter of triton before 3.9 needs numpy before 2.4")
@pytest.mark.parametrize(
    "file, least",
    [
        ("test_kernels.py", 60),
        ("test_decode.py", 28),
        ("test_dora_kernels.py", 60),
        ("test_interleaving.py", 90),
        ("test_tuning_kernels.py", 9),
        ("test_masks.py", 12),
    ],
)
def test_kernels_in_the_interpreter(file: str, least: int) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        command, env=environment, cwd=here.parents[1], capture_output=True, text=True, timeout=900, check=False
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed and int(passed[1]) >= least, child.stdout[-2000:]
