"""A training step of a decoder with the shapes of Llama-3-8B: the frozen model, stock peft, and peft by fuse().

    pytest bench/ --benchmark -k "test_end_to_end and not compiled"
    pytest bench/ --benchmark -k "test_end_to_end and checkpointing_off"    with torch.compile, which compiles each row

Every row is timed without and with clipping and AdamW. On a CPU a tiny decoder runs, without torch.compile.
"""

import json
from pathlib import Path

import pytest
from bench_end_to_end import STEPS, EndToEnd, tables
from bench_model import LLAMA_3_8B, TINY
from bench_record import hand_over, recorded
from bench_rows import END_TO_END, SMOKE

from fusedlora.timing import machine

SETTINGS = {"checkpointing_off": False, "checkpointing_on": True}


@pytest.fixture(scope="module")
def results(plan, request):
    """The result of a step and row; the rows of a setting that the session runs are measured when its first is."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    pytest.importorskip("fusedlora.integrations.peft")
    mine = [item for item in request.session.items if getattr(item, "originalname", "") == "test_end_to_end"]
    selected = [item.callspec.params for item in mine]
    effort, say = (END_TO_END, plan.say) if plan.measure else (SMOKE, print)
    size = LLAMA_3_8B if plan.on_gpu and plan.measure else TINY
    lab = EndToEnd(plan.device, size, effort, plan.backend, say, "inductor")
    found = {}

    def of(setting, row):
        if setting not in found:
            rows = [params["model_row"] for params in selected if params["setting"] == setting]
            if plan.model_rows[0] not in rows:
                rows.insert(0, plan.model_rows[0])  # the frozen model, of which every tax is
            found[setting] = lab.measure(rows, checkpointing=SETTINGS[setting])
        return [found[setting][step, row.name] for step in STEPS]

    yield of
    if plan.measure and found:
        every = [result for setting in found.values() for result in setting.values()]
        facts, folder = machine(plan.device), Path(plan.config.option.bench_out)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [", ".join(f"{name} {value}" for name, value in facts.items()), *tables(every, size)]
        (folder / "end-to-end.txt").write_text("\n".join(lines) + "\n")
        content = {"machine": facts, "size": size.title, "rows": [result.as_dict() for result in every]}
        (folder / "end-to-end.json").write_text(json.dumps(content, indent=1) + "\n")
        plan.say("\n".join([*lines, f"written to {folder}: end-to-end.json, end-to-end.txt"]))


@recorded
def test_end_to_end(benchmark, results, setting, model_row):
    plain, optimizer = results(setting, model_row)
    if plain.failed is not None:
        if model_row.library == "peft" or model_row.compiled and model_row.library == "frozen":
            pytest.skip(f"failed: {plain.failed}")
        raise AssertionError(f"{model_row.label}, {setting}: {plain.failed}\n{plain.trace}")
    facts = {"step": plain.as_dict(), "optimizer": optimizer.as_dict()}
    hand_over(benchmark, f"end to end, {setting}", plain.times, facts)
