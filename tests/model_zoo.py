"""Tiny random models of five kinds, and LoRA in eager arithmetic on them: what tests of whole models compare with."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedlora import FusedLoRALinear, apply_lora

transformers = __import__("pytest").importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB = 97


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 33)
        self.fc2 = nn.Linear(33, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


def llama(**more: object) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **more))


def gpt2(*, plain: bool = True) -> nn.Module:
    """GPT-2; with plain=True its transposed Conv1D modules are nn.Linear, as the refusal's message says to do."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop))
    for parent in list(model.modules()) if plain else ():
        for name, child in parent.named_children():
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
                linear.bias = child.bias
                setattr(parent, name, linear)
    return model


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **image))


def encoder(*, batch_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=48, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def call(kind: str, model: nn.Module) -> Tensor:
    """The output of `model` on inputs that are the same at every call."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    if kind in ("gpt2", "llama"):
        return model(input_ids=torch.randint(VOCAB, (2, 9), generator=generator), use_cache=False).logits
    shape = {"vit": (2, 3, 16, 16), "encoder": (6, 3, 32), "mlp": (3, 4, 20)}[kind]
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return model(x).logits if kind == "vit" else model(x)


BUILD = {"gpt2": gpt2, "llama": llama, "vit": vit, "encoder": encoder, "mlp": MLP}


def adapted(model: nn.Module, target_modules: object = "all-linear", **options: object) -> nn.Module:
    """apply_lora, with lora_B made random: at zero an adapter adds nothing and dA vanishes."""
    model = apply_lora(model, target_modules, **{"r": 4, "lora_alpha": 6, **options})
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, FusedLoRALinear):
                layer.lora_B.normal_(std=0.1)
    return model


class EagerLoRA(nn.Module):
    """The arithmetic of PEFT's eager layer: y = W x + b + B(A(x)) * scaling."""

    def __init__(self, base: nn.Linear, layer: FusedLoRALinear) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), layer.scaling
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


def eager_twin(stock: nn.Module, fused: nn.Module) -> nn.Module:
    """A copy of `stock` with the adapters of `fused`, in eager arithmetic and with the same parameters training."""
    twin = copy.deepcopy(stock)
    for name, layer in fused.named_modules():
        if isinstance(layer, FusedLoRALinear):
            parent, _, leaf = name.rpartition(".")
            owner = twin.get_submodule(parent)
            setattr(owner, leaf, EagerLoRA(getattr(owner, leaf), layer))
    trains = {name for name, parameter in fused.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trains)
    return twin
