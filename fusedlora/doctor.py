"""python -m fusedlora doctor: what this machine has and whether the kernels are right on it, in a screenful.

Everything that touches a GPU runs in a child process (doctor_check.py) under a time limit: a driver or a kernel that
hangs is killed and reported. A pass on a GPU leaves a marker in the user's cache directory; `doctor_passed` reads it.
Importing this module imports no torch.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import __version__, command_line, cuda_build
from .cache import cache_dir

# Its arguments are added by the caller; a test puts a hanging program here.
CHILD = [sys.executable, "-m", "fusedlora.doctor_check"]
KILL_GRACE_S = 10.0

# Set in the child, whose business is to run what has not passed yet.
under_test = False


@cache
def fingerprint() -> dict[str, str]:
    """What a pass is good for: these kernels, with what they share among launches, built by this triton."""
    digest = hashlib.sha256(Path(__file__).with_name("memory.py").read_bytes())
    spec = importlib.util.find_spec("fusedlora.kernels")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.read_bytes())
    return {"kernels": digest.hexdigest()[:16], "triton": _version_of("triton") or "none"}


def marker_path(device_capability: tuple[int, int]) -> Path:
    major, minor = device_capability
    return cache_dir() / f"doctor-sm_{major}{minor}.json"


@cache
def _passed(device_capability: tuple[int, int]) -> bool:
    try:
        marker = json.loads(marker_path(device_capability).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and all(marker.get(key) == value for key, value in fingerprint().items())


def doctor_passed(device_capability: tuple[int, int]) -> bool:
    """Whether `doctor` has run the one-launch kernels, as they are now, on this architecture of this user's.

    Reads the disk once per process and capability.
    """
    return under_test or _passed(tuple(device_capability))


def record(device_capability: tuple[int, int], passed: bool, about: dict[str, Any]) -> Path:
    """Writes the marker of a pass, or removes the one of an earlier pass. Raises OSError where it cannot."""
    path = marker_path(device_capability)
    _passed.cache_clear()
    if not passed:
        path.unlink(missing_ok=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({**fingerprint(), "fusedlora": __version__, **about}, indent=1), encoding="utf-8")
    scratch.replace(path)
    return path


@dataclass
class Outcome:
    """What became of a child: the JSON lines it printed, merged, and how it ended."""

    facts: dict[str, Any]
    failure: str | None
    log: str


def run_limited(command: list[str], limit_s: float) -> Outcome:
    """Runs a child that prints JSON objects, one a line, for at most limit_s seconds.

    A child that is over its limit is killed with all of its group; one that survives even that (a process stuck in
    the driver) is left behind and named. The last "stage" it printed says where it stopped.
    """
    # Files, not pipes: a surviving grandchild would keep a pipe open and us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)
        failure = None
        try:
            status = child.wait(limit_s)
            if status < 0:
                failure = f"the child died of signal {-status} ({signal.strsignal(-status)})"
            elif status:
                failure = f"the child ended with status {status}"
        except subprocess.TimeoutExpired:
            failure = f"HANG: not done after {limit_s:g} s, {_kill(child)}"
        except BaseException:
            _kill(child)
            raise
        facts = _read_facts(out)
        err.seek(0)
        log = err.read().decode(errors="replace").strip()
    if failure and "stage" in facts:
        failure = f"{failure}, while: {facts['stage']}"
    return Outcome(facts, failure, log)


def _kill(child: subprocess.Popen) -> str:
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        child.kill()
    try:
        child.wait(KILL_GRACE_S)
    except subprocess.TimeoutExpired:
        return f"process {child.pid} does not die"
    return "killed"


def _read_facts(out: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    out.seek(0)
    for line in out.read().decode(errors="replace").splitlines():
        try:
            fact = json.loads(line)
        except ValueError:
            continue  # a library's own chatter
        if isinstance(fact, dict):
            facts.update(fact)
    return facts


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str:
    try:
        nvcc = cuda_build.find_nvcc()
        major, minor = cuda_build.nvcc_version(nvcc)
    except cuda_build.BuildError as error:
        return f"{error} (nothing needs it)"
    return f"{major}.{minor} ({nvcc})"


def _cuda_library() -> str:
    library = cuda_build.find_library()
    return "not built (optional: python -m fusedlora build)" if library is None else str(library)


def _say(label: str, text: str) -> None:
    print(f"  {label:<10}{text}", flush=True)


def _tail(log: str) -> None:
    for line in log.splitlines()[-3:]:
        _say("", line[:110])


def _check(device: str, about: dict[str, Any], limit_s: float) -> bool:
    """One child on one device: prints what it found and keeps the marker in step. True when all is well."""
    print(f"\n{device}: {about['name']}")
    outcome = run_limited([*CHILD, "check", device], limit_s)
    facts = outcome.facts
    if "backend" in facts:
        _say("call", facts["call"])
        _say("backend", facts["backend"])
    for name, reason in facts.get("why_not", {}).items():
        _say("", f"not {name}: {reason}")
    if "check" in facts:
        _say("check", facts["check"])
    if "timing" in facts:
        _say("timing", facts["timing"])
    passed = outcome.failure is None and facts.get("ok") is True
    if outcome.failure:
        _say("FAILED", outcome.failure)
        _tail(outcome.log)
    elif not passed:
        _say("FAILED", "the numbers are wrong, see check" if "check" in facts else "the child reported nothing")
    capability = about.get("capability")
    # A pass of two launches, or of the plain path, says nothing of the kernels that wait.
    if capability and (facts.get("one_launch") or not passed):
        try:
            path = record(tuple(capability), passed, {"gpu": about["name"], "time": time.strftime("%Y-%m-%d %H:%M")})
            _say("marker", f"pass recorded in {path}" if passed else "no pass recorded")
        except OSError as error:
            _say("marker", f"could not be written: {error}")
    return passed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=command_line.device, help="check only this one, as cpu or cuda:1 (default: each kind of GPU)"
    )
    parser.add_argument(
        "--limit", type=command_line.positive, default=180.0, help="seconds a child may take (default %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report. 0: every check passed; 1: something is wrong, and the report says what."""
    print(f"fusedlora {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    outcome = run_limited([*CHILD, "facts"], args.limit)
    facts = outcome.facts
    _say("torch", facts.get("torch", f"{_version_of('torch') or 'not installed'}, did not answer"))
    _say("triton", facts.get("triton", _version_of("triton") or "not installed"))
    _say("nvcc", _nvcc())
    _say("kernels", f"of backend cuda: {_cuda_library()}")
    if outcome.failure:
        _say("FAILED", outcome.failure)
        _tail(outcome.log)
        return 1
    gpus: dict[str, dict[str, Any]] = facts["gpus"]
    for device, gpu in gpus.items():
        major, minor = gpu["capability"]
        _say(device, f"{gpu['name']}, sm_{major}{minor}, {gpu['sms']} SMs, {gpu['gib']:.0f} GiB")
    if not gpus:
        _say("GPU", facts["no_gpu"])

    chosen: dict[str, dict[str, Any]] = {}
    if args.device:
        device = "cuda:0" if args.device == "cuda" else args.device
        if device.startswith("cuda") and device not in gpus:
            _say("FAILED", f"there is no {device}; GPUs: {', '.join(gpus) or facts['no_gpu']}")
            return 1
        chosen[device] = gpus.get(device, {"name": device})
    else:
        kinds = {tuple(gpu["capability"]): device for device, gpu in reversed(gpus.items())}
        chosen = {device: gpus[device] for device in sorted(kinds.values())} or {"cpu": {"name": facts["cpu"]}}
    passed = [_check(device, about, args.limit) for device, about in chosen.items()]
    print("\nAll is well." if all(passed) else "\nSomething is wrong: see FAILED above.")
    return 0 if all(passed) else 1
