"""fusedlora.timing: statistics, interleaving, memory; the graph timer against a stand-in for CUDA."""

import contextlib

import pytest
import torch

from fusedlora import timing

CPU = torch.device("cpu")


def test_spread_interpolates():
    found = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.p10, found.p90) == pytest.approx((3.0, 1.4, 4.6))
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0)


def test_spread_of_nothing():
    with pytest.raises(ValueError, match="values is empty"):
        timing.spread([])


def test_ratios_are_per_round():
    # The clock halves from round to round: the ratio of medians would be the same, the per-round spread would not.
    assert timing.ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == timing.Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="2 rounds, base has 1"):
        timing.ratios([1.0, 2.0], [1.0])


def test_interleave_order_and_warmup():
    order = []

    def timer(name):
        def take():
            order.append(name)
            return float(len(order))

        return take

    names = "abcd"
    taken = timing.interleave({name: timer(name) for name in names}, rounds=20, warmup=1)
    rounds = [order[i : i + 4] for i in range(0, 84, 4)]
    assert all(sorted(one) == list(names) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 8, "rounds have different orders"
    for name in names:
        assert taken[name] == [float(4 * i + rounds[i].index(name) + 1) for i in range(1, 21)]


def test_interleave_wants_rounds():
    with pytest.raises(ValueError, match="rounds is 0"):
        timing.interleave({}, rounds=0)


def test_wall_timer_runs_every_call_and_hands_over_what_was_prepared():
    given = []
    timer = timing.WallTimer(
        [lambda y: given.append(("first", y)), lambda y: given.append(("second", y))],
        prepare=[lambda: 1, lambda: 2],
        device=CPU,
        block_seconds=0.0,
    )
    given.clear()
    assert timer() > 0
    assert given == [("first", 1), ("second", 2)]


def test_wall_timer_repeats_to_fill_its_block():
    calls = []
    timer = timing.WallTimer([lambda: calls.append(1)], device=CPU, block_seconds=1.0)
    assert timer.repeats == 1000  # the cap, for a call that takes next to nothing


def test_peak_memory_counts_what_lives_at_once():
    def call():
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        gone = torch.empty(3 << 20, dtype=torch.uint8)
        del gone
        return kept, torch.empty(1 << 20, dtype=torch.uint8)

    assert timing.peak_memory(call, CPU) == 4 << 20


def test_set_count_exceeds_twice_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 << 20)
    assert timing.set_count(1 << 30, CPU) == 4
    for size in (13 << 20, 20 << 20, 25 << 20):
        assert (timing.set_count(size, CPU) - 1) * size <= 100 << 20 < timing.set_count(size, CPU) * size
    with pytest.raises(ValueError, match="bytes_per_set is 0"):
        timing.set_count(0, CPU)


def test_machine_names_cpu_and_versions():
    facts = timing.machine(CPU)
    assert facts["torch"] == torch.__version__ and facts["cpu"]
    assert "gpu" not in facts


class FakeStream:
    device = CPU

    def synchronize(self):
        pass


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 6.0


class FakeGraph:
    """Notes what is captured into it and when it is replayed."""

    log: list = []

    def __init__(self):
        self.captured = []

    def pool(self):
        return id(self)

    def replay(self):
        FakeGraph.log.append(("replay", *self.captured))

    def reset(self):
        FakeGraph.log.append(("reset", *self.captured))


@pytest.fixture
def fake_cuda(monkeypatch):
    current: list[FakeGraph] = []
    FakeGraph.log = []

    @contextlib.contextmanager
    def capture(graph, pool=None, stream=None):
        assert isinstance(stream, FakeStream) and not current, "captures do not nest"
        graph.in_pool = pool
        current.append(graph)
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
    return current


def test_graph_timer_captures_once_after_warming_up(fake_cuda):
    eager = []

    def call(name):
        def run():
            (fake_cuda[0].captured if fake_cuda else eager).append(name)
            return name

        return run

    timer = timing.GraphTimer([call("a"), call("b")], stream=FakeStream(), warmup=2, block_seconds=0.0)
    assert eager == ["a", "b", "a", "b"]
    assert timer.graph.captured == ["a", "b"] and timer.outputs == "b"
    assert timer.repeats == 1
    assert timer() == pytest.approx(6e-3 / 2)
    timer.close()
    assert timer.outputs is None and FakeGraph.log[-1] == ("reset", "a", "b")


def test_graph_timer_prepares_in_a_graph_of_its_own(fake_cuda):
    def note(name):
        if fake_cuda:
            fake_cuda[0].captured.append(name)
        return name

    timer = timing.GraphTimer(
        [lambda y: note(f"use {y}"), lambda y: note(f"use {y}")],
        prepare=[lambda: note("y0"), lambda: note("y1")],
        stream=FakeStream(),
        block_seconds=0.1,
    )
    assert timer.preparing.captured == ["y0", "y1"]
    assert timer.graph.captured == ["use y0", "use y1"]
    assert timer.graph.in_pool == timer.preparing.pool(), "what forward saved lives in the first graph's pool"
    assert FakeGraph.log[0] == ("replay", "y0", "y1"), "data must be there before the first timed replay"
    assert timer.repeats == 17  # 0.1 s in blocks of 6 ms
    FakeGraph.log.clear()
    timer()
    assert FakeGraph.log == [("replay", "use y0", "use y1")] * 17, "prepare is not timed"


def test_graph_timer_refuses_the_default_stream(fake_cuda, monkeypatch):
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream)
    with pytest.raises(ValueError, match="stream is the default stream"):
        timing.GraphTimer([lambda: None], stream=stream)


@pytest.mark.gpu
def test_graph_timer_times_training_on_a_gpu():
    device = torch.device("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        w = torch.randn(256, 256, device=device)
        sets = [torch.randn(256, 256, device=device, requires_grad=True) for _ in range(4)]

        def step(x):
            y = x @ w
            return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))

        timer = timing.GraphTimer([lambda x=x: step(x) for x in sets], stream=stream)
        y, dx = timer.outputs
        y.fill_(float("nan"))
        timer.replay()
    stream.synchronize()
    torch.testing.assert_close(y, sets[-1].detach() @ w)
    torch.testing.assert_close(dx, torch.ones_like(y) @ w.t())
    assert 0 < min(timer() for _ in range(10)) < 1e-2  # others may use the GPU too
    timer.close()
