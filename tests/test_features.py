"""Every feature of a layer on every backend: the reference path, the kernels in Triton's interpreter and on a GPU.

What a cell does is in feature_table.py. None may fall back: each asserts the backend that took its calls.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")
# Tests run in importlib mode, where a neighbour is no module to import by name.
_spec = importlib.util.spec_from_file_location("fusedlora_feature_table", Path(__file__).with_name("feature_table.py"))
assert _spec is not None and _spec.loader is not None
table = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(table)

pytestmark = pytest.mark.filterwarnings("ignore:.*has no bias. This means that merging:UserWarning")


def rows(column: str) -> list[str]:
    return [name for name, feature in table.FEATURES.items() if column in feature.columns]


@pytest.mark.parametrize("feature", rows("reference"))
def test_reference(feature: str) -> None:
    table.check("reference", feature)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What came of each cell in a process of its own: the interpreter is switched on before triton is imported."""
    triton = pytest.importorskip("triton")
    # by version, since a failure of the kernels there must not pass for one of numpy
    if triton.__version__ < "3.9" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton before 3.9 needs numpy before 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # -P: tests/kernels must not answer to `import kernels`
    command = [sys.executable, "-P", table.__file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


@pytest.mark.parametrize("feature", rows("interpreter"))
def test_interpreter(feature: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[feature] is None, interpreted[feature]


@pytest.mark.gpu
@pytest.mark.parametrize("feature", rows("gpu"))
def test_gpu(feature: str) -> None:
    table.check("gpu", feature)


def test_only_what_needs_a_gpu_lacks_a_cell() -> None:
    assert rows("gpu") == list(table.FEATURES)
    assert rows("reference") == rows("interpreter")
    assert set(table.FEATURES) - set(rows("reference")) == {"fp16 AMP with GradScaler", "CUDA graph"}
