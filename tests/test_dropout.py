"""The seeded dropout mask: its definition, its statistics, and how its seeds are drawn."""

import itertools
import math
import threading
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusedlora
from fusedlora import dropout
from fusedlora.testing import make_inputs

CPU = torch.device("cpu")


def mask_of(seed: int, M: int, K: int, p: float) -> torch.Tensor:
    return dropout.as_mask(torch.tensor([seed]), M, K, p, CPU)


def seeds(count: int) -> list[int]:
    return torch.randint(2**62, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("M", [1, 16, 37, 43])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999])
def test_the_definition_in_python_integers(p: float, M: int) -> None:
    seed, K = 2**62 + 0xFEDCBA9876543, 40
    low, high, wrap = seed % 2**32, seed >> 32, 2**32
    got = mask_of(seed, M, K, p)
    assert got.shape == (M, K)
    for m, k in itertools.product(range(M), range(K)):
        z = (((m // 16 * 8 + m % 8) * 3 + k // 16) * 4 + k % 8 // 2 + low) % wrap * 0x9E3779B9
        z = ((z ^ z >> 32) % wrap ^ high) * 0xBB67AE85
        h = (z ^ z >> 32) % wrap
        factor, turn = (0xD2511F53, 16) if k % 16 < 8 else (0xA54FF53B, 8)
        z = h * factor
        word = (z ^ z >> 32) % wrap
        if m % 16 >= 8:
            word ^= h >> turn | h % 2**turn << 32 - turn
        assert got[m, k].item() == ((word >> k % 2 * 16) % 2**15 >= round(p * 2**15))


def test_in_parts_as_at_once(monkeypatch) -> None:
    whole = mask_of(2**62 + 9, 100, 78, 0.3)
    for size in (1, 1000):  # one run of 16 rows at a time, and three
        monkeypatch.setattr(dropout, "_CHUNK", size)
        assert torch.equal(mask_of(2**62 + 9, 100, 78, 0.3), whole)


def test_fewer_rows_are_the_first_of_more() -> None:
    more = mask_of(2**62 + 9, 100, 78, 0.3)
    for M in (0, 1, 8, 9, 16, 23, 99):
        assert torch.equal(mask_of(2**62 + 9, M, 78, 0.3), more[:M])


def test_no_rows() -> None:
    assert mask_of(2**62, 0, 16, 0.5).shape == (0, 16)


def deviations(kept: torch.Tensor, p: float, count: int) -> torch.Tensor:
    """By how many standard deviations numbers of kept elements out of `count` stray from what they should be."""
    return (kept.double() - count * (1 - p)) / math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_rate_of_a_mask_its_rows_and_its_columns(p: float) -> None:
    M, K = 2048, 1024
    for seed in seeds(3):
        mask = mask_of(seed, M, K, p)
        assert abs(deviations(mask.sum(), p, M * K)) < 4.5
        for dim, count in ((1, K), (0, M)):
            z = deviations(mask.sum(dim), p, count)
            assert z.abs().max() < 6
            assert abs(z.std() - 1) < 0.1


def correlation(a: torch.Tensor, b: torch.Tensor, p: float) -> float:
    """Of two masks, in standard deviations of what independent ones give."""
    a, b = a.double() - (1 - p), b.double() - (1 - p)
    return ((a * b).mean() / (p * (1 - p)) * math.sqrt(a.numel())).item()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p: float) -> None:
    for seed in seeds(3):
        mask = mask_of(seed, 1024, 1024, p)
        for dm, dk in itertools.product((0, 1, 2, 7, 8, 9, 16, 24, 64, 128), (0, 1, 2, 4, 8, 16, 32, 64, 512)):
            if dm or dk:
                assert abs(correlation(mask[dm:, dk:], mask[: 1024 - dm, : 1024 - dk], p)) < 5, (dm, dk)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rectangles_have_no_parity(p: float) -> None:
    """Row and column enter the hash as a sum: were it too weak, the corners of a rectangle would hang together."""
    for seed in seeds(2):
        signs = mask_of(seed, 1024, 1024, p).double() - (1 - p)
        for dm, dk in itertools.product((1, 2, 16, 256), repeat=2):
            product = signs[dm:, dk:] * signs[:-dm, dk:] * signs[dm:, :-dk] * signs[:-dm, :-dk]
            scale = (p * (1 - p)) ** 2
            assert abs((product.mean() / scale * math.sqrt(product.numel())).item()) < 6, (dm, dk)


def test_runs_of_eight_have_every_pattern() -> None:
    mask = mask_of(seeds(1)[0], 4096, 1024, 0.5).view(-1, 8)
    patterns = (mask.int() * 2 ** torch.arange(8)).sum(1).bincount(minlength=256).double()
    expected = len(mask) / 256
    chi2 = ((patterns - expected) ** 2 / expected).sum().item()
    assert 255 - 6 * math.sqrt(510) < chi2 < 255 + 6 * math.sqrt(510)


def of_one_hash(mask: torch.Tensor) -> torch.Tensor:
    """[count, 8] of a mask [M, K], both multiples of 16: the elements that share a hash."""
    M, K = mask.shape
    return mask.view(M // 16, 2, 8, K // 16, 2, 4, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(-1, 8)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5])
def test_the_eight_of_one_hash_are_independent(p: float) -> None:
    for seed in seeds(2):
        eight = of_one_hash(mask_of(seed, 2048, 1024, p))
        signs = (eight.double() - (1 - p)) / math.sqrt(p * (1 - p))
        for size in range(1, 5):
            for chosen in itertools.combinations(range(8), size):
                assert abs(signs[:, chosen].prod(1).mean().item() * math.sqrt(len(eight))) < 5, chosen


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_eights_have_every_outcome(p: float) -> None:
    for seed in seeds(2):
        eight = of_one_hash(mask_of(seed, 2048, 1024, p))
        outcomes = (eight.int() * 2 ** torch.arange(8)).sum(1).bincount(minlength=256).double()
        kept = torch.tensor([number.bit_count() for number in range(256)])
        expected = len(eight) * (1 - p) ** kept * p ** (8 - kept)
        often = expected > 5  # χ² says nothing of what hardly ever comes: all of that is one outcome
        if not often.all():
            outcomes = torch.cat((outcomes[often], outcomes[~often].sum()[None]))
            expected = torch.cat((expected[often], expected[~often].sum()[None]))
        chi2 = ((outcomes - expected) ** 2 / expected).sum().item()
        assert chi2 < len(expected) - 1 + 6 * math.sqrt(2 * (len(expected) - 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_up_to_the_highest_rate_numbers_compare_as_their_bits(dtype: torch.dtype) -> None:
    """What the kernels rely on: 15 bits as a 16-bit floating-point number, NaNs the largest."""
    words = torch.arange(2**15).to(torch.int16)
    for p in (0.0, 1e-4, 0.1, 0.5, dropout.MAX_P):
        bound = torch.tensor(dropout.threshold(p), dtype=torch.int16)
        assert torch.equal(~(words.view(dtype) < bound.view(dtype)), words >= bound)


def test_above_the_highest_rate_there_is_a_mask_and_no_kernel() -> None:
    i = make_inputs(6, 16, 24, 4)
    assert dropout.draw(i.x, dropout.MAX_P, "triton").dtype is torch.int64
    drawn = dropout.draw(i.x, 0.97, "triton")
    assert drawn.dtype is torch.bool and drawn.shape == (6, 16)
    with pytest.raises(ValueError, match="dropout_p is 0.97, with a seed it must be at most 0.96"):
        dropout.launch_dropout(torch.tensor([2**62]), 0.97, 1.0)


def test_a_seed_is_on_the_cpu_whatever_the_default_device_is() -> None:
    x = torch.zeros(2, 8)
    with torch.device("meta"):
        assert dropout.draw(x, 0.5, "triton").device.type == "cpu"


def test_close_seeds_give_independent_masks() -> None:
    p, base = 0.1, 2**62 + 12345
    others = [base + 1, base + 2, base + 1024, base + 2**32, base + 2**33, base ^ 2**31, base + 2**48, base ^ 2**60]
    others += [seed >> 32 << 32 | base % 2**32 for seed in seeds(4)]  # the same lower half
    mask = mask_of(base, 1024, 1024, p)
    for other in others:
        theirs = mask_of(other, 1024, 1024, p).view(-1)
        for shift in (0, 1, 2, 1024):
            overlap = correlation(mask.view(-1)[shift:], theirs[: 2**20 - shift], p)
            assert abs(overlap) < 5 or 2 * (other - base) == shift, (other - base, shift)


def test_split_mix() -> None:
    """The first outputs of SplitMix64 from the state 0, as its authors' programs print them."""
    assert [dropout._mix(state * 0x9E3779B97F4A7C15 % 2**64) for state in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("p", [0.0, 1e-10, 0.5, 1 - 1e-12])
def test_threshold_fits(p: float) -> None:
    assert 0 <= dropout.threshold(p) < 2**15


def test_a_cpu_draws_a_mask_and_for_the_kernels_a_seed() -> None:
    x = torch.zeros(3, 5, 16)
    torch.manual_seed(0)
    mask = dropout.draw(x, 0.5, "auto")
    assert mask.dtype is torch.bool and mask.shape == (15, 16)
    drawn = [dropout.draw(x, 0.5, "triton") for _ in range(50)]
    assert len({seed.item() for seed in drawn}) == 50
    assert all(seed.dtype is torch.int64 and seed.shape == (1,) and seed.item() >= 2**62 for seed in drawn)
    torch.manual_seed(0)
    assert torch.equal(dropout.draw(x, 0.5, "auto"), mask)


class Generator:
    """A CUDA generator's seed and offset."""

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def test_a_seed_for_every_seed_and_offset_of_the_generator() -> None:
    device = torch.device("cuda", 0)
    found = set()
    for seed in (0, 1, 2, 2**64 - 1):
        generator = Generator(seed, 0)
        with mock.patch.object(torch.cuda, "default_generators", (generator,)):
            found |= {dropout._next_seed(device) for _ in range(500)}
        assert generator.offset == 2000
    assert len(found) == 2000 and all(2**62 <= seed < 2**63 for seed in found)


def test_two_threads_draw_two_seeds() -> None:
    class Interrupted(Generator):
        def get_offset(self) -> int:
            offset = self.offset
            if not started:  # the other thread's turn, as far as it gets
                started.append(threading.Thread(target=draw))
                started[0].start()
                started[0].join(0.1)
            return offset

    def draw() -> None:
        found.append(dropout._next_seed(torch.device("cuda", 0)))

    started: list[threading.Thread] = []
    found: list[int] = []
    with mock.patch.object(torch.cuda, "default_generators", (Interrupted(1, 0),)):
        draw()
        started[0].join()
    assert len(set(found)) == 2


@pytest.mark.gpu
class TestOnAGPU:
    """As nn.Dropout does under torch.manual_seed, checkpointing and graph replay; the kernels are asked for by name."""

    p = 0.3

    def layer(self, **settings) -> fusedlora.FusedLoRALinear:
        torch.manual_seed(0)
        given = {"r": 16, "lora_dropout": self.p, "device": "cuda", "dtype": torch.bfloat16} | settings
        layer = fusedlora.FusedLoRALinear(256, 384, **given)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.backend = "triton"
        return layer

    def step(self, call, x: torch.Tensor, parameters) -> list[torch.Tensor]:
        y = call(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]

    def test_manual_seed_and_a_mask_for_each_call(self) -> None:
        layer = self.layer()
        x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
        torch.manual_seed(7)
        first, second = layer(x), layer(x)
        torch.manual_seed(7)
        assert torch.equal(layer(x), first) and not torch.equal(first, second)
        state = torch.cuda.get_rng_state()
        third = layer(x)
        torch.cuda.set_rng_state(state)
        assert torch.equal(layer(x), third)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant: bool) -> None:
        layer = self.layer()
        x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        parameters = [layer.lora_A, layer.lora_B]

        def grads(call) -> list[torch.Tensor]:
            torch.manual_seed(3)
            layer.zero_grad()
            x.grad = None
            y = call(x)
            y.float().square().sum().backward()
            return [y.detach(), x.grad, *(p.grad for p in parameters)]

        plain = grads(layer)
        again = grads(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
        assert all(torch.equal(a, b) for a, b in zip(plain, again))

    def test_a_fresh_mask_at_each_replay_the_same_in_backward(self) -> None:
        layer = self.layer(adapter_dtype=torch.float32)
        x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        parameters = [layer.lora_A, layer.lora_B]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(layer, x, parameters)
        torch.cuda.synchronize()
        drawn = []
        draw = dropout.draw
        graph = torch.cuda.CUDAGraph()
        with (
            mock.patch.object(dropout, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1]),
            torch.cuda.graph(graph, stream=stream),
        ):
            captured = self.step(layer, x, parameters)
        assert [seed.device.type for seed in drawn] == ["cuda"]
        seen = []
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            seen.append(drawn[0].item())
            with mock.patch.object(dropout, "draw", lambda *args: torch.tensor([seen[-1]])):
                eager = self.step(layer, x, parameters)
            assert all(torch.equal(a, b) for a, b in zip(captured, eager))
        assert len(set(seen)) == 3

    def test_every_backend_uses_the_seeds_mask(self) -> None:
        i = make_inputs(130, 256, 128, 16, torch.bfloat16, device="cuda", dropout_p=0.0)
        call = {"scaling": 1.0, "dropout_p": self.p}
        seed = torch.tensor([2**62 + 77])
        with mock.patch.object(dropout, "draw", lambda *args: seed):
            results = [
                fusedlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, backend=name, **call)
                for name in ("triton", "reference")
            ]
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
