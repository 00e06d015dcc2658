"""Options, markers and the `device` fixture shared by every test."""

import os

# Before torch is imported: xdist's workers share the cores, and so do the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch

from fusedlora import backends, cuda, node, tuning, why_not

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedlora")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the `device` fixture")
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")
    group.addoption("--at-once", action="store_true", help="show failures when they happen, not at the end")


class _AtOnce:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"FAILED {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--at-once") and reporter is not None:  # xdist's workers have none and leave it to their parent
        config.pluginmanager.register(_AtOnce(reporter))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_slow = pytest.mark.skip(reason="slow: run with --slow")
    # triton reads TRITON_INTERPRET when it is imported, so such a process can only serve the kernels' own tests.
    interpreting = pytest.mark.skip(reason="TRITON_INTERPRET=1: only tests/kernels runs in the interpreter")
    has_gpu = config.getoption("--device") != "cpu" and torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(not_slow)
        if INTERPRETING and item.path.parent.name != "kernels":
            item.add_marker(interpreting)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200 and with Triton's kernels, as far as why_not looks."""
    monkeypatch.setattr(why_not, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(why_not, "_triton_missing", lambda: None)
    monkeypatch.setattr(why_not, "_triton_version", lambda: (3, 6))
    monkeypatch.setattr(cuda, "num_sms", lambda device: 132)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: None)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "last_used", None)


@pytest.fixture(autouse=True)
def without_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that this user has built takes calls in its own tests only: others look at what Python does."""
    monkeypatch.setattr(node, "load", lambda kind: False)
    monkeypatch.setattr(node, "run", None)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: CUDA where there is one, else the CPU; `--device` chooses."""
    choice = request.config.getoption("--device")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: torch.cuda.is_available() is False")
    return torch.empty(0, device=choice).device  # with an index, as tensors have it


@pytest.fixture(scope="session")
def cuda_kernels() -> None:
    """Backend cuda on a GPU that it is for: its library is built if it has to be, or the test is skipped."""
    from fusedlora import cuda_build

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("backend cuda needs compute capability 9.0")
    if cuda.missing() is not None:
        try:
            cuda_build.build(print)
        except cuda_build.BuildError as error:
            pytest.skip(str(error))
        cuda.found.cache_clear()


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend with kernels, for tests on a GPU that hold for both."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    return request.param


@pytest.fixture(autouse=True)
def _no_tuned_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's user has tuned is no part of a test."""
    monkeypatch.setattr(tuning, "tables", lambda gpu: ())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
