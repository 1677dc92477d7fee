"""What the LoRA tests share: adapted tiny models, equal for equal seeds, and what to read from them."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from petune import FusedLoraConfig, fuse
from tests.families import FAMILIES

DEVICE = torch.get_default_device().type
BERT, GPT2, LLAMA = FAMILIES["bert"], FAMILIES["gpt2"], FAMILIES["llama"]


def adapted(config_cls=LoraConfig, family=BERT, head="none", dtype=torch.float32, seed=1, **fields):
    """A fresh adapted model whose A and B are random, equal for equal seeds whatever the config class."""
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | fields
    base = family.build(head=head).to(dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, config_cls(**fields))


def pair(**fields):
    return adapted(FusedLoraConfig, **fields), adapted(LoraConfig, **fields)


def with_two(config_cls, **fields):
    """A model with a second, inactive adapter of another rank."""
    model = adapted(config_cls, **fields)
    torch.manual_seed(2)
    model.add_adapter(
        "other", config_cls(**({"r": 3, "target_modules": ["query"], "init_lora_weights": False} | fields))
    )
    return model


def output(model, family=BERT, **kwargs):
    return model(**family.inputs(), **kwargs)[0]


def layers(model, kind=LoraLinear):
    return [module for module in model.modules() if isinstance(module, kind)]


def gradient(model):
    """All gradients of the trainable parameters in one vector, in float64."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat([grad.double().flatten() for grad in gradients])


class Attention(nn.Module):
    """Three maps of one input, and places to disturb them."""

    def __init__(self, features=7):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(features, 5), nn.Linear(features, 3, bias=False), nn.Linear(features, 5)

    def forward(self, x, fail=False, skip=False, change=False):
        q = self.q(x)
        if fail:
            raise OverflowError("in the middle")
        if skip:
            return q
        if change:
            torch.Tensor.mul_(x, 2.0)
        k = self.k(x)
        v = self.v(x)
        return torch.cat([q, k, v], dim=-1)


def attention_twins(base=None, **fields):
    """The same adapted `Attention` twice: fused and grouped, and PEFT's own."""
    base = base or Attention()
    fields = {"r": 2, "target_modules": ["q", "k", "v"], "init_lora_weights": False} | fields
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        pair.append(get_peft_model(copy.deepcopy(base), LoraConfig(**fields)))
    fuse(pair[0])
    return pair
