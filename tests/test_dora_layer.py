"""FusedLoRALinear with use_dora: its start, state, merging, files, and whole models, against peft."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusedlora import (
    FusedLoRALinear,
    apply_lora,
    explain,
    load_adapter,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    report,
    save_adapter,
    unmerge_lora,
)
from fusedlora.testing import relative_error

peft = pytest.importorskip("peft")

K, N, R = 48, 32, 4
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
KEYS = ["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"]


def trained(device="cpu", dtype=FP64, **options) -> FusedLoRALinear:
    """A layer with an adapter and magnitudes that are not those of its start."""
    layer = FusedLoRALinear(K, N, device=device, dtype=dtype, **({"r": R, "lora_alpha": 6, "use_dora": True} | options))
    nn.init.normal_(layer.lora_B, std=0.5)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1 + 0.3 * torch.randn(N, device=device))
    return layer


def rows(device="cpu", dtype=FP64, M: int = 7) -> torch.Tensor:
    return torch.randn(M, K, device=device, dtype=dtype)


def exact_weight(layer: FusedLoRALinear) -> torch.Tensor:
    adapted = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return (layer.lora_magnitude_vector.double() / adapted.norm(dim=1)).unsqueeze(1) * adapted


def exact(layer: FusedLoRALinear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), exact_weight(layer), None if layer.bias is None else layer.bias.double())


# the start


@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(FP64, None), (FP32, None), (BF16, None), (BF16, BF16)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("made", ["new", "from_linear", "reset"])
def test_starts_as_its_linear(made: str, dtype, adapter_dtype, device) -> None:
    options = {"r": R, "use_dora": True, "adapter_dtype": adapter_dtype}
    if made == "from_linear":
        layer = FusedLoRALinear.from_linear(nn.Linear(K, N, device=device, dtype=dtype), **options)
    else:
        layer = FusedLoRALinear(K, N, device=device, dtype=dtype, **options)
    if made == "reset":
        with torch.no_grad():
            layer.weight.mul_(3)
        layer.reset_lora_parameters()
    assert layer.lora_magnitude_vector.dtype is layer.lora_A.dtype
    assert (
        relative_error(layer.lora_magnitude_vector, layer.weight.double().norm(dim=1))
        < torch.finfo(layer.lora_A.dtype).eps
    )
    x = rows(device, dtype, 50)
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    # the reference rounds x Wᵀ before the bias is added
    plain = relative_error(F.linear(x, layer.weight, layer.bias), want)
    assert relative_error(layer(x), want) <= max(1.6 * plain, 2 * torch.finfo(dtype).eps * (dtype is FP64))


def test_parameters(device) -> None:
    layer = FusedLoRALinear(K, N, device=device, dtype=BF16, r=R, use_dora=True)
    assert [name for name, _ in layer.named_parameters()] == KEYS
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(KEYS[2:])
    assert list(layer.adapter_parameters) == KEYS[2:]
    assert layer.lora_magnitude_vector.shape == (N,) and layer.lora_magnitude_vector.dtype is FP32
    plain = FusedLoRALinear(K, N, r=R)
    assert plain.lora_magnitude_vector is None and list(plain.adapter_parameters) == KEYS[2:4]
    assert list(plain.state_dict()) == KEYS[:4]


def test_printed() -> None:
    assert "r=4, lora_alpha=6, use_dora=True" in repr(trained())


# what it computes


@pytest.mark.parametrize("bias", [True, False])
def test_output(bias: bool, device) -> None:
    layer = trained(device, bias=bias)
    x = rows(device)
    assert relative_error(layer(x), exact(layer, x)) < 1e-14
    layer.adapters_enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


CHANGES = {
    "in place": lambda layer, new: layer.weight.mul_(0).add_(new),
    "through .data": lambda layer, new: layer.weight.data.copy_(new),
    "a new Parameter": lambda layer, new: setattr(layer, "weight", nn.Parameter(new, requires_grad=False)),
    "a state dict": lambda layer, new: layer.load_state_dict({"weight": new, "bias": layer.bias}),
    "one row": lambda layer, new: layer.weight[3].copy_(new[3]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_changed_weight_is_seen_at_once(change: str, mode: str, device) -> None:
    layer = trained(device).train(mode == "train")
    x = rows(device)
    before = layer(x)
    with torch.no_grad():
        CHANGES[change](layer, 2 * torch.randn(N, K, dtype=FP64, device=device))
    assert relative_error(layer(x), exact(layer, x)) < 1e-14
    assert not torch.equal(layer(x), before)


def test_moved_and_cast(device) -> None:
    layer = trained("cpu", FP32)
    layer(rows("cpu", FP32))
    layer.to(device, FP64)
    x = rows(device)
    assert layer.lora_magnitude_vector.dtype is FP64
    assert relative_error(layer(x), exact(layer, x)) < 1e-14


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_dropout(autocast: bool, device) -> None:
    """In training as peft to the bit; otherwise it is none, and the ops run."""
    layer = trained(device, BF16, lora_dropout=0.3)
    twin = peft_twin(layer)
    x = rows(device, BF16)
    with torch.autocast(device.type, BF16, enabled=autocast):
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        assert torch.equal(y, twin(x))
    assert layer.last_backend == "reference"
    told = explain(x, layer)
    assert told.backend == "reference" and "of the dropped x too" in told.why_not["triton"]
    layer.backend = "triton"
    assert explain(x, layer).backend == "none"
    with pytest.raises(RuntimeError, match="with dropout in training"):
        layer(x)
    layer.backend = "auto"
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "of the dropped x too" not in str(explain(x, layer))


def peft_twin(layer: FusedLoRALinear) -> nn.Module:
    """peft's layer with the same numbers."""
    base = nn.Linear(K, N, layer.bias is not None, layer.weight.device, layer.weight.dtype)
    config = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        lora_dropout=layer.lora_dropout,
        use_dora=True,
        use_rslora=layer.use_rslora,
        target_modules=["0"],
    )
    twin = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        base.weight.copy_(layer.weight)
        if layer.bias is not None:
            base.bias.copy_(layer.bias)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(twin, name)["default"].weight = nn.Parameter(getattr(layer, name).detach().clone())
    return twin


@pytest.mark.parametrize("rslora", [False, True])
def test_training_is_pefts(rslora: bool, device) -> None:
    layer = trained(device, use_rslora=rslora)
    twin = peft_twin(layer)
    x, target = rows(device), torch.randn(7, N, dtype=FP64, device=device)
    ours = [p for p in layer.parameters() if p.requires_grad]
    theirs = [getattr(twin, name)["default"].weight for name in KEYS[2:]]
    pair = [(m, torch.optim.Adam(p, lr=0.05)) for m, p in ((layer, ours), (twin, theirs))]
    for _ in range(4):
        for model, optimizer in pair:
            optimizer.zero_grad()
            (model(x) - target).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert relative_error(a.detach(), b.detach()) < 1e-12
    assert relative_error(layer(x), twin(x)) < 1e-12


def test_compiled(device) -> None:
    torch._dynamo.reset()
    layer = trained(device, FP32)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = rows(device, FP32)
    gradients = []
    for call in (layer, step):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    assert len(gradients[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# its state


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(way: str, device) -> None:
    layer = trained(device)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = trained(device)
        twin.load_state_dict(layer.state_dict())
    x = rows(device)
    assert same_state(layer, twin) and torch.equal(layer(x), twin(x))
    assert twin.lora_magnitude_vector is not layer.lora_magnitude_vector


def test_state_dicts_that_lack_something(device) -> None:
    layer = trained(device)
    state = layer.state_dict()
    del state["lora_magnitude_vector"]
    with pytest.raises(RuntimeError, match='Missing key.*"lora_magnitude_vector"'):
        layer.load_state_dict(state)
    magnitude = layer.lora_magnitude_vector.detach().clone()
    layer.load_state_dict(nn.Linear(K, N, device=device, dtype=FP64).state_dict())
    assert torch.equal(layer.lora_magnitude_vector, magnitude)
    with pytest.raises(RuntimeError, match='Unexpected key.*"lora_magnitude_vector"'):
        FusedLoRALinear(K, N, device=device, dtype=FP64, r=R).load_state_dict(layer.state_dict())


def test_from_the_meta_device(device) -> None:
    layer = FusedLoRALinear(K, N, device="meta", dtype=FP32, r=R, use_dora=True)
    assert layer.lora_magnitude_vector.is_meta
    layer.to_empty(device=device).reset_parameters()
    assert relative_error(layer.lora_magnitude_vector, layer.weight.double().norm(dim=1)) < 1e-6
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    layer.reset_lora_parameters()
    x = rows(device, FP32)
    assert relative_error(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < 1e-6


# merging


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(FP64, None), (FP32, None), (BF16, None), (BF16, BF16)], ids=str
)  # fmt: skip
def test_merged(dtype, adapter_dtype, precision: str, device) -> None:
    layer = trained(device, dtype, adapter_dtype=adapter_dtype)
    want = exact_weight(layer).detach()
    base, x = layer.weight.detach().clone(), rows(device, dtype)
    separate = layer(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        layer.merge()
    finally:
        torch.set_float32_matmul_precision(before)
    # one rounding of the weight, and that of the norm to the magnitude's dtype
    eps = torch.finfo(dtype).eps
    assert relative_error(layer.weight, want) < (0.5 * eps if dtype is BF16 else 2 * eps)
    assert relative_error(layer(x), separate.double()) < 4 * eps
    assert list(layer.state_dict()) == KEYS and torch.equal(layer.state_dict()["weight"].to(device), base)
    layer.unmerge()
    assert torch.equal(layer.weight, base) and torch.equal(layer(x), separate)


def test_merged_for_good(device) -> None:
    layer = trained(device).merge(keep_base=False)
    assert list(layer.state_dict()) == KEYS[:2]


def test_a_row_without_direction_is_not_merged(device) -> None:
    layer = trained(device)
    with torch.no_grad():
        layer.weight[2], layer.lora_B[2] = 0, 0
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged


# models and files


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(F.gelu(self.up(x))))


FIELDS = {"target_modules": ["up", "down"], "r": 3, "lora_alpha": 7, "use_dora": True}


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    x = torch.randn(6, 12, dtype=FP64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-12 * b.norm()


X = torch.randn(6, 12, dtype=FP64, generator=torch.Generator().manual_seed(2))


def test_apply_lora_and_back() -> None:
    stock = MLP().double()
    model = apply_lora(copy.deepcopy(stock), **FIELDS)
    same(model(X), stock(X))
    assert [p.shape for p in lora_parameters(model)] == [(3, 12), (20, 3), (20,), (3, 20), (12, 3), (12,)]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.{name}" for layer in ("up", "down") for name in KEYS[2:]
    }
    assert report(model).trainable_params == 3 * 12 + 20 * 3 + 20 + 3 * 20 + 12 * 3 + 12
    y = train(model)(X)
    assert (y - stock(X)).norm() > 1e-3 * y.norm()
    same(merge_lora(model)(X), y)
    same(unmerge_lora(model)(X), y)
    plain = merge_and_unload(model)
    assert type(plain.up) is nn.Linear
    same(plain(X), y)


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True, "lora_dropout": 0.2}, {"rank_pattern": {"up": 5}}], ids=str)
def test_files_of_ours_in_peft(extra, tmp_path) -> None:
    stock = MLP().double()
    model = train(apply_lora(copy.deepcopy(stock), **FIELDS | extra)).eval()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    assert theirs.peft_config["default"].use_dora
    same(theirs(X), model(X))
    again = load_adapter(copy.deepcopy(stock), tmp_path).eval()
    assert torch.equal(again(X), model(X)) and all(layer.use_dora for layer in (again.up, again.down))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True, "lora_dropout": 0.2}, {"rank_pattern": {"up": 5}}], ids=str)
def test_files_of_peft_in_ours(extra, tmp_path) -> None:
    stock = MLP().double()
    config = peft.LoraConfig(**FIELDS | extra)
    theirs = train(peft.get_peft_model(copy.deepcopy(stock), config)).eval()
    theirs.save_pretrained(tmp_path)
    fresh = load_adapter(copy.deepcopy(stock), tmp_path).eval()
    same(fresh(X), theirs(X))
    adapted = load_adapter(apply_lora(copy.deepcopy(stock), **FIELDS | extra), tmp_path).eval()
    assert torch.equal(adapted(X), fresh(X))


def test_files_that_do_not_fit(tmp_path) -> None:
    stock = MLP().double()
    save_adapter(apply_lora(copy.deepcopy(stock), **FIELDS), tmp_path / "dora")
    save_adapter(apply_lora(copy.deepcopy(stock), **FIELDS | {"use_dora": False}), tmp_path / "lora")
    with pytest.raises(ValueError, match="use_dora of up is True in adapter_config.json, False in the model"):
        load_adapter(apply_lora(copy.deepcopy(stock), **FIELDS | {"use_dora": False}), tmp_path / "dora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ValueError, match=r"lacks base_model\.model\.down\.lora_magnitude_vector"):
        load_adapter(copy.deepcopy(stock), tmp_path / "lora")


def test_a_mixture_has_no_file(tmp_path) -> None:
    model = apply_lora(MLP(), **FIELDS)
    model.down = FusedLoRALinear(20, 12, False, r=3, lora_alpha=7)
    with pytest.raises(ValueError, match="use_dora is True on up and False on down"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
