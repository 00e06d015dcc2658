"""python -m fusedlora and its doctor: what it prints, its exit status, its time limit and its marker."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusedlora import __main__ as cli
from fusedlora import __version__, command_line, doctor, doctor_check
from fusedlora.config import Problem, decode_config, forward_config


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    doctor._passed.cache_clear()
    return doctor.cache_dir()


def child(monkeypatch: pytest.MonkeyPatch, *, facts: dict | None = None, check: str) -> None:
    """Puts a program in the place of the doctor's child: these facts, and `check` as the code of its check."""
    told = {"torch": "t", "triton": "3", "gpus": {}, "no_gpu": "none", "cpu": "1 thread"} | (facts or {})
    code = f"import json, os, sys, time\nif sys.argv[1] == 'facts':\n  print(json.dumps({told!r}))\nelse:\n  "
    monkeypatch.setattr(doctor, "CHILD", [sys.executable, "-c", code + check.replace("\n", "\n  ")])


ONE_GPU = {"gpus": {"cuda:0": {"name": "Some GPU", "capability": [12, 1], "sms": 48, "gib": 16.0}}}
GOOD = """print(json.dumps({"call": "c", "backend": "triton", "one_launch": True, "check": "right", "timing": "fast"}))
print(json.dumps({"stage": "done", "ok": True}))"""


class TestCommandLine:
    def test_no_command_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([])
        assert stop.value.code == 2
        assert "COMMAND" in capsys.readouterr().err

    def test_unknown_command_is_an_error(self) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main(["cure"])
        assert stop.value.code == 2

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main(["--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.split() == ["fusedlora", __version__]

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_help_of_every_command(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert {"run": "-- COMMAND", "build": "Hopper"}.get(command, "--device") in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments, said",
        [
            ("doctor --limit 0", "argument --limit: '0' is not a number above 0"),
            ("doctor --limit -1", "argument --limit: '-1' is not a number above 0"),
            ("doctor --limit nan", "argument --limit: 'nan' is not a number above 0"),
            ("doctor --device foo", "argument --device: 'foo' is not a device such as cpu, cuda or cuda:1"),
            ("tune --device foo", "argument --device: 'foo' is not a device"),
            ("tune --rows 1,x", "argument --rows: '1,x' is not one or more whole numbers of at least 1"),
            ("tune --r 0", "argument --r: '0' is not one or more whole numbers of at least 1"),
            ("tune --jobs 0", "argument --jobs: '0' is not a whole number of at least 1"),
            ("demo --device cuda:x", "argument --device: 'cuda:x' is not a device"),
            ("demo --batch-size 0", "argument --batch-size: '0' is not a whole number of at least 1"),
            ("demo --packages 1", "argument --packages: '1' is not a whole number of at least 2"),
            ("demo --per-package 1", "argument --per-package: '1' is not a whole number of at least 2"),
            ("demo --max-length 513", "argument --max-length: '513' is not a whole number from 3 to 512"),
            ("demo --lr inf", "argument --lr: 'inf' is not a number above 0"),
            ("demo --epochs 0", "argument --epochs: '0' is not a number above 0"),
            ("demo --steps 0", "argument --steps: '0' is not a whole number of at least 1"),
            ("demo --seed -1", "argument --seed: '-1' is not a whole number from 0"),
        ],
    )
    def test_a_misfit_is_one_line(self, arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments.split())
        assert stop.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        "count, built_for, reason",
        [
            (0, None, "there is no cuda:1: this torch is a CPU build"),
            (0, "13.0", "there is no cuda:1: this torch can use no GPUs"),
            (1, "13.0", "there is no cuda:1: this torch can use 1 GPU"),
            (2, "13.0", None),
        ],
    )
    def test_a_gpu_that_is_not_there(self, count: int, built_for, reason, monkeypatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert command_line.missing_gpu("cuda:1") == reason and command_line.missing_gpu("cpu") is None

    def test_asking_for_help_imports_no_torch(self) -> None:
        code = (
            "import sys; from fusedlora.__main__ import main\n"
            "try: main(['doctor', '-h'])\nexcept SystemExit: print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False", done.stderr


class TestDoctor:
    def test_on_the_cpu(self) -> None:
        """The real thing, in a process of its own."""
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "fusedlora", "doctor", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        fields = {line.split()[0]: line.split(None, 1)[1] for line in lines if len(line.split(None, 1)) == 2}
        assert len(lines) <= 24
        assert fields["torch"].startswith(torch.__version__)
        assert {"triton", "nvcc", "GPU"} <= set(fields)
        assert fields["backend"].startswith("reference")
        assert fields["not"].startswith("triton: ")
        assert fields["check"].endswith("right")
        assert "frozen linear" in fields["timing"] and "fusedlora" in fields["timing"]

    @pytest.mark.parametrize("facts, said", [({}, "GPUs: none"), (ONE_GPU, "GPUs: cuda:0")], ids=["none", "one"])
    def test_a_device_that_is_not_there(self, facts: dict, said: str, monkeypatch, capsys) -> None:
        child(monkeypatch, facts=facts, check="raise AssertionError")
        assert cli.main(["doctor", "--device", "cuda:1"]) == 1
        assert capsys.readouterr().out.endswith(f"there is no cuda:1; {said}\n")

    def test_cuda_is_its_first_device(self, monkeypatch, capsys) -> None:
        child(monkeypatch, facts=ONE_GPU, check=GOOD)
        assert cli.main(["doctor", "--device", "cuda"]) == 0
        assert "cuda:0: Some GPU" in capsys.readouterr().out and doctor.doctor_passed((12, 1))

    def test_threads_are_counted_in_words(self, monkeypatch, capsys) -> None:
        for count, said in ((1, "1 thread"), (3, "3 threads")):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
            doctor_check.facts()
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["cpu"] == said

    def test_hang_is_reported_with_its_stage(self, monkeypatch, capsys) -> None:
        child(monkeypatch, check='print(json.dumps({"stage": "launching"}), flush=True); time.sleep(600)')
        begin = time.monotonic()
        assert cli.main(["doctor", "--limit", "5"]) == 1
        assert time.monotonic() - begin < 60
        out = capsys.readouterr().out
        assert "HANG: not done after 5 s, killed, while: launching" in out
        assert "Something is wrong" in out

    def test_a_hang_takes_grandchildren_along(self, tmp_path: Path) -> None:
        """A compiler started by the child dies with it."""
        pid_file = tmp_path / "pid"
        code = (
            "import subprocess, sys, time\n"
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(pid_file)!r}, 'w').write(str(p.pid)); time.sleep(600)"
        )
        outcome = doctor.run_limited([sys.executable, "-c", code], 3)
        assert "HANG" in outcome.failure
        pid = int(pid_file.read_text())
        for _ in range(100):
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                return
            if state == "Z":
                return
            time.sleep(0.1)
        pytest.fail(f"the grandchild still runs, in state {state}")

    def test_hang_in_the_driver(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(doctor, "CHILD", [sys.executable, "-c", "import time; time.sleep(600)"])
        assert cli.main(["doctor", "--limit", "1"]) == 1
        assert "HANG" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("check", "said"),
        [
            ("os.abort()", "died of signal 6"),
            ('sys.exit("no kernel image")', "status 1"),
            ('sys.exit("no kernel image")', "no kernel image"),
            ("pass", "the child reported nothing"),
            ('print(json.dumps({"check": "far off: WRONG", "ok": False}))', "the numbers are wrong"),
        ],
        ids=["abort", "status", "its last words", "silence", "wrong numbers"],
    )
    def test_failures(self, monkeypatch, capsys, check: str, said: str) -> None:
        child(monkeypatch, check=check)
        assert cli.main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert said in out and "FAILED" in out

    def test_wrong_numbers_are_found(self, monkeypatch, capsys) -> None:
        """The check itself: a fused path that is off by two percent."""
        right = doctor_check.lora_linear
        monkeypatch.setattr(doctor_check, "lora_linear", lambda *a, **k: right(*a, **k) * 1.02)
        doctor_check.check(torch.device("cpu"))
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert told[-1]["ok"] is False
        assert any(fact.get("check", "").endswith("WRONG") for fact in told)

    def test_nan_is_found(self, monkeypatch, capsys) -> None:
        right = doctor_check.lora_linear
        monkeypatch.setattr(doctor_check, "lora_linear", lambda *a, **k: right(*a, **k) * float("nan"))
        doctor_check.check(torch.device("cpu"))
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert told[-1]["ok"] is False
        assert any("NaN" in fact.get("check", "") for fact in told)

    @pytest.mark.parametrize("capability, num_sms", [(80, 108), (89, 128), (90, 132), (100, 148), (120, 170)])
    @pytest.mark.parametrize("checked", [doctor_check.CHECKS, doctor_check.REPEATED], ids=["errors", "bits"])
    def test_forwards_of_all_kinds_are_checked(self, checked, capability: int, num_sms: int) -> None:
        """Some whose tiles wait for S, which a launch of its own then need not compute, and some whose tiles do."""
        problems = [Problem(M, 768, 1024, r, 2, False, capability, num_sms) for M, r in checked]
        in_tiles = {forward_config(p).IN_TILES for p in problems if decode_config(p) is None}
        assert in_tiles == ({False, True} if capability in (90, 100) else {False})


class TestMarker:
    def test_pass_is_recorded_for_its_architecture_alone(self, monkeypatch, capsys, cache_folder: Path) -> None:
        child(monkeypatch, facts=ONE_GPU, check=GOOD)
        assert not doctor.doctor_passed((12, 1))
        assert cli.main(["doctor"]) == 0
        assert str(cache_folder) in capsys.readouterr().out
        assert doctor.doctor_passed((12, 1))
        assert not doctor.doctor_passed((12, 0))
        marker = json.loads(doctor.marker_path((12, 1)).read_text())
        assert marker["gpu"] == "Some GPU" and marker["fusedlora"] == __version__

    def test_failure_takes_an_earlier_pass_back(self, monkeypatch) -> None:
        child(monkeypatch, facts=ONE_GPU, check=GOOD)
        assert cli.main(["doctor"]) == 0
        child(monkeypatch, facts=ONE_GPU, check="time.sleep(600)")
        assert cli.main(["doctor", "--limit", "5"]) == 1
        assert not doctor.doctor_passed((12, 1))
        assert not doctor.marker_path((12, 1)).exists()

    def test_a_pass_without_the_one_launch_kernels_is_not_recorded(self, monkeypatch) -> None:
        plain = GOOD.replace('"one_launch": True', '"one_launch": False')
        child(monkeypatch, facts=ONE_GPU, check=plain)
        assert cli.main(["doctor"]) == 0
        assert not doctor.doctor_passed((12, 1))

    @pytest.mark.parametrize("key", ["kernels", "triton"])
    def test_pass_of_other_kernels_or_another_triton_does_not_count(self, key: str) -> None:
        path = doctor.record((9, 0), True, {})
        assert doctor.doctor_passed((9, 0))
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: "other"}))
        doctor._passed.cache_clear()
        assert not doctor.doctor_passed((9, 0))

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", "\0"])
    def test_a_damaged_marker_is_no_pass(self, text: str, cache_folder: Path) -> None:
        cache_folder.mkdir(parents=True)
        doctor.marker_path((9, 0)).write_text(text)
        assert not doctor.doctor_passed((9, 0))

    def test_a_cache_that_cannot_be_written_is_said(self, monkeypatch, capsys, cache_folder: Path) -> None:
        cache_folder.parent.mkdir(parents=True, exist_ok=True)
        cache_folder.write_text("a file in the folder's place")
        child(monkeypatch, facts=ONE_GPU, check=GOOD)
        assert cli.main(["doctor"]) == 0
        assert "could not be written" in capsys.readouterr().out

    def test_the_child_may_run_what_has_not_passed(self, monkeypatch) -> None:
        monkeypatch.setattr(doctor, "under_test", True)
        assert doctor.doctor_passed((12, 1))

    def test_fingerprint_follows_the_kernels(self) -> None:
        found = doctor.fingerprint()
        assert set(found) == {"kernels", "triton"}
        shared = Path(doctor.__file__).with_name("memory.py").read_bytes()
        assert found["kernels"] != doctor.hashlib.sha256(shared).hexdigest()[:16], "no kernel source was read"
