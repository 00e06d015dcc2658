"""The end-to-end rows on a tiny decoder: what is shared, what the check catches, what the tables show."""

import pytest
import torch
from bench_check import WrongResult
from bench_end_to_end import STEPS, EndToEnd, Result, tables
from bench_model import LLAMA_3_8B, TARGETS, TINY, ModelRow, R, Run, decoder, model_rows, with_adapters
from bench_model_check import Reference, kept
from bench_rows import SMOKE

from fusedlora.timing import ratios, spread

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("fusedlora.integrations.peft")
CPU = torch.device("cpu")
FROZEN, AMP, OURS = ModelRow("frozen"), ModelRow("fusedlora", "fp32"), ModelRow("fusedlora", "bf16")


@pytest.fixture(scope="module")
def base():
    return decoder(TINY, CPU)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(7)
    shape = (TINY.batch, TINY.length, TINY.width)
    return torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape).bfloat16()


@pytest.fixture(scope="module")
def reference(base, batch):
    return Reference(base, *batch)


def test_rows():
    rows = model_rows(compile=True)
    assert len({row.name for row in rows}) == len({row.label for row in rows}) == len(rows) == 18
    assert rows[0] == FROZEN and rows[0].name == "frozen"
    assert ModelRow("fusedlora", "fp32", 0.05, True).name == "fusedlora_amp_compiled_dropout"
    assert not any(row.compiled for row in model_rows(compile=False))


def test_size_is_that_of_llama_3_8b():
    assert (LLAMA_3_8B.width, LLAMA_3_8B.inner, LLAMA_3_8B.tokens) == (4096, 14336, 8192)


def test_models_share_the_frozen_weights(base):
    ours = with_adapters(base, OURS, checkpointing=False)
    names = dict(base.named_parameters())
    shared = {p.data_ptr() for p in ours.parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in names.values()}
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * TINY.layers and all(R in p.shape for p in trained)
    other = with_adapters(base, AMP, checkpointing=True)
    assert other.base_model.model.is_gradient_checkpointing
    for a, b in zip(trained, (p for p in other.parameters() if p.requires_grad), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)
    precise = with_adapters(base, FROZEN, checkpointing=False, precise=True)
    assert all(p.dtype == torch.float32 for p in precise.parameters())
    assert all(p.dtype == torch.bfloat16 for p in base.parameters())


@pytest.mark.parametrize("row", [AMP, OURS], ids=lambda row: row.name)
def test_a_wrong_model_is_not_timed(base, batch, reference, row):
    assert max(reference.check(Run(row, with_adapters(base, row, checkpointing=True), *batch)).values()) < 0.1
    model = with_adapters(base, row, checkpointing=False)
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            layer.scaling["default"] *= 1.2
    with pytest.raises(WrongResult, match="(h|dA|dB) is off by"):
        reference.check(Run(row, model, *batch))
    model = with_adapters(base, row, checkpointing=False)
    last = [p for name, p in model.named_parameters() if "lora_A" in name][-1]
    last.register_hook(torch.neg)
    with pytest.raises(WrongResult, match="dA is off by 2"):
        reference.check(Run(row, model, *batch))


@pytest.mark.parametrize("library", ["peft", "fusedlora"])
def test_dropout_is_checked_by_its_masks(base, batch, reference, library):
    row = ModelRow(library, "fp32", 0.05)
    run = Run(row, with_adapters(base, row, checkpointing=True), *batch)
    assert max(reference.check(run).values()) < 0.1
    with kept(run) as masks:
        run.outputs()
    assert len(masks) == 2 * len(TARGETS) * TINY.layers, "each block runs twice"
    half = len(masks) // 2
    assert torch.equal(masks[0].flatten(), masks[half + (TINY.layers - 1) * len(TARGETS)].flatten())
    run.model.eval()
    with pytest.raises(WrongResult, match="0 of 14 layers drew a mask|dropout took"):
        reference.check(run)


def test_compiled_rows(base, batch, reference):
    """As graphs, but without a code generator: a compiler's time is not a test's."""
    row = ModelRow("fusedlora", "bf16", 0.05, compiled=True)
    model = with_adapters(base, row, checkpointing=False)
    assert reference.check(Run(row, model, *batch, compiler="aot_eager")) == {}
    model.eval()
    with pytest.raises(WrongResult, match="from that without dropout"):
        reference.check(Run(row, model, *batch, compiler="aot_eager"))


def test_measured(base):
    lab = EndToEnd(CPU, TINY, SMOKE, "reference", print, "aot_eager")
    rows = [FROZEN, ModelRow("frozen", compiled=True), OURS, ModelRow("fusedlora", "bf16", compiled=True)]
    found = lab.measure(rows, checkpointing=False)
    assert {result.failed for result in found.values()} == {None}
    for (step, name), result in found.items():
        assert result.tax is not None and result.peak_bytes > 0 and result.errors, (step, name)
        assert (result.compiled_tax is not None) == (result.graphs is not None) == name.endswith("compiled")
    assert found["optimizer", "fusedlora"].peak_bytes > 0
    wrong = EndToEnd(CPU, TINY, SMOKE, "triton", print, "aot_eager").measure([FROZEN, OURS], checkpointing=False)
    assert wrong["step", "fusedlora"].failed.startswith("BackendMismatch")
    assert wrong["step", "frozen"].tax.median == 1.0


def test_optimizer_step_trains(base, batch):
    run = Run(AMP, with_adapters(base, AMP, checkpointing=False), *batch)
    before = [p.clone() for p in run.parameters]
    run.step()
    assert all(map(torch.equal, before, run.parameters))
    run.optimizer_step()
    assert not any(map(torch.equal, before, run.parameters))
    assert batch[0].grad is None and all(p.grad is None for p in run.parameters)


def test_tables():
    def result(row, seconds, peak, **more):
        times = [seconds] * 3
        return Result(
            row, False, "step", 8192, times, spread(times), ratios(times, [0.1] * 3), peak_bytes=peak << 20, **more
        )

    failed = Result(ModelRow("peft", "fp32"), False, "step", 8192, failed="OutOfMemoryError: too large")
    compiled = result(ModelRow("fusedlora", "bf16", compiled=True), 0.1, 150, compiled_tax=spread([1.02]))
    lines = tables(
        [result(FROZEN, 0.1, 100), failed, result(OURS, 0.104, 115, errors={"h": 1e-2}), compiled], LLAMA_3_8B
    )
    text = "\n".join(lines)
    assert "activation checkpointing off: " + STEPS["step"] in text and "checkpointing on" not in text
    assert "failed: OutOfMemoryError: too large" in text
    ours = next(line for line in lines if line.startswith("  fusedlora by fuse(), bf16 adapters  "))
    assert ours.split()[-8:] == ["adapters", "104.00", "78769", "1.040", "[1.040–1.040]", "115.0", "1.150", "1.0e-02"]
    assert "1.020" in next(line for line in lines if "torch.compile" in line)
