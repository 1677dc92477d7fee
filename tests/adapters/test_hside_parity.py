"""The paper's form against a reference of its own: plain torch, in float64, forward and gradients."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from petune.adapters.side import HierarchicalSideConfig
from petune.adapters.side.hierarchical_layer import HierarchicalBlock
from tests.adapters.hside_models import HEADS, PAPER, beside, net, pictures, vit
from tests.conftest import relative_error

Weights = dict[str, Tensor]


def linear(x: Tensor, p: Weights, name: str) -> Tensor:
    return x @ p[f"{name}.map.weight"].T + p[f"{name}.bias"]


def layer_norm(x: Tensor, p: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def convolve(x: Tensor, p: Weights, name: str, size: int) -> Tensor:
    weight = p[f"{name}.map.weight"]
    weight = weight.reshape(len(weight), x.shape[1], size, size)
    return F.conv2d(x, weight, p.get(f"{name}.bias"), stride=2, padding=1 if size == 3 else 0)


def tokens_of(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def backbone(model: ViTForImageClassification, blocks: list[HierarchicalBlock], pixels: Tensor) -> list[Tensor]:
    """Hidden states of every block, each with the meta token before them."""
    x = model.vit.embeddings(pixels, interpolate_pos_encoding=True)
    found: list[Tensor] = []
    for block in blocks:
        p = dict(block.base_layer.named_parameters())
        learned = dict(block.petune_hside_through["default"].named_parameters())
        for index, norm in enumerate(("layernorm_before", "layernorm_after")):
            p |= {f"{norm}.{part}": learned[f"norms.{index}.{part}"] for part in ("weight", "bias")}
        x = torch.cat([learned["meta"].repeat(len(x), 1, 1), x], dim=1)
        h = layer_norm(x, p, "layernorm_before", 1e-12)
        q, k, v = (h @ p[f"attention.{n}_proj.weight"].T + p[f"attention.{n}_proj.bias"] for n in "qkv")
        x = x + attention(q, k, v, 4) @ p["attention.o_proj.weight"].T + p["attention.o_proj.bias"]
        h = layer_norm(x, p, "layernorm_after", 1e-12)
        h = F.gelu(h @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + h @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
        found.append(x)
        x = x[:, learned["meta"].shape[1] :]
    return found


def side_block(x: Tensor, meta: Tensor, patches: Tensor, p: Weights, name: str, heads: int) -> Tensor:
    few = torch.cat([meta, patches.mean(1, keepdim=True)], dim=1)
    h = layer_norm(x, p, f"{name}.attention_norm", 1e-6)
    k, v = linear(few, p, f"{name}.key_value").chunk(2, dim=-1)
    x = x + linear(attention(linear(h, p, f"{name}.query"), k, v, heads), p, f"{name}.out")
    x = x + patches
    h = F.gelu(linear(layer_norm(x, p, f"{name}.mlp_norm", 1e-6), p, f"{name}.mlp_in"))
    return x + linear(h, p, f"{name}.mlp_out")


def reference(model, pixels: Tensor, ends: tuple[int, ...], grid: tuple[int, int], metas: int, train: bool) -> Tensor:
    base = model.get_base_model()
    outputs = backbone(base, list(base.vit.layers), pixels)
    p = dict(net(model).named_parameters())
    image, start = pixels, 0
    for stage, end in enumerate(ends):
        name = f"stages.{stage}"
        if stage == 0:
            image = convolve(image, p, f"{name}.embed.conv_in", 3)
            norm = net(model).stage(0).embed.batch_norm
            mean = image.mean((0, 2, 3)) if train else norm.running_mean
            var = image.var((0, 2, 3), unbiased=False) if train else norm.running_var
            image = (image - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
            image = image * norm.weight[:, None, None] + norm.bias[:, None, None]
            image = convolve(image.relu(), p, f"{name}.embed.conv_out", 2)
        else:
            image = convolve(image, p, f"{name}.embed.down", 3)
        size = image.shape[2:]
        x = layer_norm(tokens_of(image), p, f"{name}.embed.norm", 1e-5)
        for block, y in enumerate(outputs[start:end]):
            patches = y[:, metas + 1 :].transpose(1, 2).unflatten(2, grid)
            patches = F.interpolate(patches, size=size, mode="bilinear", align_corners=False)
            patches = linear(tokens_of(patches), p, f"{name}.bridge")  # after resizing, as the authors do
            inner = f"{name}.blocks.{block}"
            meta = layer_norm(linear(y[:, :metas], p, f"{name}.bridge"), p, f"{inner}.meta_norm", 1e-5)
            x = side_block(x, meta, patches, p, inner, HEADS[stage])
        x = layer_norm(x, p, f"{name}.norm", 1e-6)
        image, start = x.transpose(1, 2).unflatten(2, size), end
    pooled = x.mean(1)
    norm = net(model).head.norm
    mean = pooled.mean(0) if train else norm.running_mean
    var = pooled.var(0, unbiased=False) if train else norm.running_var
    pooled = (pooled - mean) / (var + 1e-6).sqrt()
    return pooled @ p["head.linear.weight"].T + p["head.linear.bias"]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("blocks", "metas", "ends", "height", "width"),
    [(4, 1, (1, 2, 3, 4), 32, 32), (7, 3, (1, 3, 5, 7), 40, 56)],
    ids=["a block a stage", "seven blocks, three tokens, no square"],
)
def test_the_papers_form_computes_what_the_reference_does(blocks, metas, ends, height, width, train):
    model = beside(vit(blocks=blocks).double(), meta_tokens=metas, **PAPER).double()
    _shake(model)
    pixels = pictures(height, width)["pixel_values"].double()
    expected = reference(
        model, pixels, ends, (height // 8, width // 8), metas, train
    )  # before training moves BatchNorm
    logits = model.train(train)(pixel_values=pixels, interpolate_pos_encoding=True).logits
    assert relative_error(logits, expected) <= 1e-10
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((logits * weights).sum(), list(named.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(named.values()))
    worst = {name: relative_error(a, b) for name, a, b in zip(named, ours, theirs, strict=True) if b.norm() > 1e-12}
    assert len(worst) > 0.9 * len(named)  # what norms take out again has no gradient
    assert max(worst.values()) <= 1e-6


def _shake(model: torch.nn.Module) -> None:
    """Biases off 0, gains off 1, running statistics off those of the start."""
    rng = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "petune_hside" in name and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=rng, dtype=torch.float64))


def test_the_papers_settings_on_vit_b_train_764840_parameters_beside_the_head():
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=100))
        model = get_peft_model(base, HierarchicalSideConfig(detach=False, fusion="replace"))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if ".head." in name)
    assert head == 72 * 100 + 100
    assert sum(trained.values()) - head == 764_840
    through = [count for name, count in trained.items() if "petune_hside_through" in name]
    assert sum(through) == 12 * 2 * 2 * 768 + 12 * 768  # the norms' copies and the meta tokens
