"""The pyramid beside a ViT: stages, tokens and grids, its maps, what is kept for backward, and its checkpoints."""

import copy
import pickle
from itertools import pairwise

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from petune.adapters.side import hierarchical_net
from petune.adapters.side.hierarchical_net import SideBlock
from petune.topology import find_topology
from tests.adapters.harness import base_tensors, gradients, output, train
from tests.adapters.hside_models import (
    DIMS,
    PAPER,
    REGISTERS,
    adapted,
    beside,
    config,
    held,
    net,
    pictures,
    tuner,
    vit,
)
from tests.adapters.ladder_models import block_outputs, family, saved_bytes
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 1 + REGISTERS}

# ----------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("blocks", [2, 4, 5, 7, 12, 13, 24])
def test_stages_are_as_even_as_the_number_of_blocks_allows_and_read_them_all(blocks):
    ends = config().stage_ends(blocks)
    sizes = [end - start for start, end in pairwise((0, *ends))]
    assert ends[-1] == blocks
    assert max(sizes) - min(sizes) <= 1


def test_twelve_blocks_are_spread_as_in_the_paper():
    assert config().stage_ends(12) == config(block_indices=[2, 5, 8, 11]).stage_ends(12) == (3, 6, 9, 12)


@pytest.mark.parametrize("fields", [{}, {"detach": False}], ids=["detached", "attached"])
@pytest.mark.parametrize(("name", "blocks"), [("vit", 7), ("dinov2", 5), ("deit", 3)])
def test_every_block_has_a_side_block_that_learns(name, blocks, fields):
    model = adapted(name, blocks, **fields).train()
    model(**pictures()).loss.backward()
    assert sum(isinstance(module, SideBlock) for module in model.modules()) == blocks
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.norm() == 0)] == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and "petune_hside" not in n] == []


def test_blocks_that_no_stage_reads_run_and_have_no_side_block():
    with pytest.warns(UserWarning, match=r"leaves blocks 4\.\.5 computed but unused"):
        model = adapted(blocks=6, block_indices=[0, 1, 2, 3])
    assert sum(isinstance(module, SideBlock) for module in model.modules()) == 4
    assert tuner(model).read_blocks == {0, 1, 2, 3, 5}
    before = output(model, pictures())
    model.get_base_model().vit.layers[4].base_layer.mlp.fc2.weight.data.mul_(-2.0)
    assert relative_error(output(model, pictures()), before) > 1e-3


def test_a_feature_cache_is_told_which_blocks_are_read_and_why_it_cannot_keep_them():
    assert tuner(adapted(blocks=5)).read_blocks == set(range(5))
    assert tuner(adapted(blocks=5)).why_not_cached is None
    assert "set detach=True" in str(tuner(adapted(blocks=5, detach=False)).why_not_cached)


# ----------------------------------------------------------------------------------------------- tokens and grids


@pytest.mark.parametrize("name", PREFIX)
def test_patches_stand_behind_all_prefix_tokens_and_the_class_token_is_the_first(name, monkeypatch):
    model, seen = adapted(name, 4), []
    monkeypatch.setattr(SideBlock, "forward", lambda _, x, meta, patches: seen.append((meta, patches)) or x)
    with torch.no_grad(), block_outputs(base := vit(name, 4)) as found:
        model(**pictures())
        base(**pictures())
        y = list(found.values())[-1][1]
        assert y.shape[1] == PREFIX[name] + 16
        grid = y[:, PREFIX[name] :].transpose(1, 2).unflatten(2, (4, 4))
        grid = F.interpolate(grid, size=(1, 1), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        meta, patches = seen[-1]
        bridge = net(model).stage(3).bridge
        assert relative_error(meta, bridge(y[:, :1])) <= TOLERANCE[torch.float32]
        assert relative_error(patches, bridge(grid)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [
        (32, 32, [(8, 8), (4, 4), (2, 2), (1, 1)]),
        (40, 72, [(10, 18), (5, 9), (3, 5), (2, 3)]),
        (24, 19, [(6, 5), (3, 3), (2, 2), (1, 1)]),
    ],
)
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_images_of_other_sizes_give_maps_that_halve_and_round_up(name, height, width, sizes):
    model = adapted(name)
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    maps = tuner(model).features(pictures(height, width)["pixel_values"], **options)
    assert [tuple(one.shape) for one in maps] == [(3, dim, *size) for dim, size in zip(DIMS, sizes, strict=True)]
    assert torch.isfinite(model(**pictures(height, width), **options).logits).all()


def test_a_change_in_a_corner_of_the_image_changes_that_corner_of_the_map_most():
    model = beside(family("vit", 4, image_size=(32, 64)).build(head="cls"))
    pixels = pictures(32, 64)["pixel_values"]
    changed = pixels.clone()
    changed[..., 24:, :8] += 3.0
    with torch.no_grad():
        before, after = (tuner(model).features(pixel_values=p)[0] for p in (pixels, changed))
    moved = (after - before).norm(dim=(0, 1))
    assert moved.shape == (8, 16)
    assert moved[6:, :2].mean() > 3 * moved[:3, 4:].mean()


def test_a_spectrogram_is_an_image_of_one_channel_in_the_orientation_of_its_patches():
    sizes = {"max_length": 44, "num_mel_bins": 24, "patch_size": 6, "frequency_stride": 4, "time_stride": 5}
    model = beside(family("ast", 4, **sizes).build(head="cls"))
    seen = {}
    stem = net(model).stage(0).embed
    stem.register_forward_pre_hook(lambda _, args: seen.update(image=args[0]))
    sound = torch.randn(2, 44, 24)
    maps = tuner(model).features(sound)
    assert torch.equal(seen["image"], sound.transpose(1, 2)[:, None])
    assert [tuple(one.shape[2:]) for one in maps] == [(6, 11), (3, 6), (2, 3), (1, 2)]
    assert relative_error(maps[1], tuner(model).features(input_values=sound)[1]) == 0.0


# ----------------------------------------------------------------------------------------------------------- maps


def test_the_class_token_alone_takes_what_the_last_map_has_on_average():
    model = adapted()
    with torch.no_grad():
        last = tuner(model).features(pixel_values=pictures()["pixel_values"])[3]
        expected = net(model).exit(last.mean((2, 3)))
        states = model(**pictures(), output_hidden_states=True).hidden_states[-1]
        base = vit()(**pictures(), output_hidden_states=True).hidden_states[-1]
    assert relative_error(states[:, 0] - base[:, 0], expected) <= TOLERANCE[torch.float32]
    assert torch.equal(states[:, 1:], base[:, 1:])


@pytest.mark.parametrize("fields", [{}, {"fusion": "replace"}, {"detach": False}], ids=str)
def test_maps_train_the_side_network_and_nothing_stays_behind(fields):
    model = adapted(**fields).train()
    maps = tuner(model).features(pixel_values=pictures()["pixel_values"])
    assert tuner(model).progress.maps == []
    sum(one.square().sum() for one in maps).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(".exit." in name or ".head." in name for name in without)
    model(**pictures())
    assert held(model) == []
    model.get_base_model().vit(pictures()["pixel_values"])
    assert tuner(model).progress.maps == []


def test_maps_of_a_model_without_a_head_and_of_the_adapter_that_is_on():
    base = family("dinov2", 4).build()
    model = beside(base)
    torch.manual_seed(7)
    model.add_adapter("other", config(dims=[4, 4, 4, 4], heads=[1, 1, 1, 1]))
    pixels = pictures()["pixel_values"]
    assert [one.shape[1] for one in tuner(model).features(pixels)] == DIMS
    model.set_adapter("other")
    assert [one.shape[1] for one in tuner(model).features(pixels)] == [4, 4, 4, 4]


def test_a_head_of_its_own_stands_in_for_the_classifier():
    model = adapted(**PAPER).train()
    batch = pictures()
    with torch.no_grad():
        pooled = tuner(model.eval()).features(batch["pixel_values"])[3].mean((2, 3))
        assert relative_error(model(**batch).logits, net(model).head(pooled)) <= TOLERANCE[torch.float32]
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(vit(), batch))


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("fields", [{}, {"detach": False}, {"fusion": "replace"}, {"bits": 1}], ids=str)
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers", "ast"])
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(name, fields):
    model = adapted(name, **fields, storage="latent") if name != "ast" else beside(family("ast", 5).build(head="cls"))
    batch = FAMILIES["ast"].inputs(4, head="cls") if name == "ast" else pictures(batch=4)
    before = base_tensors(model)
    losses = train(model, batch, steps=12, lr=1e-2)
    assert losses[-1] < 0.8 * losses[0]
    after = base_tensors(model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_learned_norms_change_the_output_and_not_the_base():
    model = adapted(detach=False)
    layer = model.get_base_model().vit.layers[2]
    before, norm = output(model, pictures()), layer.base_layer.layernorm_before.weight.clone()
    layer.petune_hside_through["default"].norms[0].weight.data.mul_(1.5)
    assert relative_error(output(model, pictures()), before) > 1e-4
    assert torch.equal(layer.base_layer.layernorm_before.weight, norm)
    with model.disable_adapter():
        assert torch.equal(output(model, pictures()), output(vit(), pictures()))


def test_branches_are_dropped_more_towards_the_end_and_in_training_alone():
    model = adapted(blocks=5, drop_path=0.8)
    rates = [module.drop_path for module in model.modules() if isinstance(module, SideBlock)]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(output(model, pictures()), output(model, pictures()))
    block = next(m for m in model.modules() if isinstance(m, SideBlock) and m.drop_path > 0.7).train()
    dim = block.mlp_norm.weight.numel()
    x, nothing = torch.randn(400, 1, 1, dim), torch.zeros(400, 1, 1, dim)
    with torch.no_grad():
        same = (block(x, torch.randn(400, 1, dim), nothing) - x).flatten(1).norm(dim=1) == 0
    assert same.float().mean().item() == pytest.approx(0.8**2, abs=0.08)  # both branches of a row


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_computing_again_in_backward_gives_the_same_gradients(drop_path, monkeypatch):
    model = adapted(drop_path=drop_path).train()

    def loss() -> torch.Tensor:
        torch.manual_seed(8)
        return model(**pictures()).loss

    again = gradients(model, loss)
    monkeypatch.setattr(hierarchical_net, "checkpoint", lambda function, *args, **_: function(*args))
    kept = gradients(model, loss)
    assert again.keys() == kept.keys()
    assert max(relative_error(again[name], kept[name]) for name in kept) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("fields", [{}, PAPER], ids=["ours", "paper"])
def test_gradients_under_autocast_are_those_of_float32_to_bf16_rounding(fields):
    model = adapted(**fields).train()

    def autocast_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**pictures()).loss

    exact, rounded = gradients(model, lambda: model(**pictures()).loss), gradients(model, autocast_loss)
    assert exact.keys() == rounded.keys()
    left, right = (torch.cat([g[name].flatten().double() for name in exact]) for g in (exact, rounded))
    assert F.cosine_similarity(left, right, dim=0) > 0.99


# ---------------------------------------------------------------------------------------------------------- memory


def _saved(blocks: int = 4, ffn: int = 48, **fields: object) -> int:
    return saved_bytes(beside(vit(blocks=blocks, intermediate_size=ffn), **fields), pictures())


def test_no_activation_of_the_backbone_is_kept_when_it_is_detached():
    assert _saved(ffn=48) == _saved(ffn=480)
    assert _saved(ffn=48, detach=False) < _saved(ffn=480, detach=False)


def test_a_detached_side_network_keeps_less_than_lora_and_the_less_the_deeper_the_model():
    ratios = []
    for blocks in (4, 8, 16):
        sizes = {"hidden_size": 128, "intermediate_size": 512, "image_size": 64}
        lora = get_peft_model(vit(blocks=blocks, **sizes), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        mine = beside(vit(blocks=blocks, **sizes), dims=[32, 48, 64, 72], heads=[2, 4, 8, 12])
        ratios.append(saved_bytes(mine, pictures(64, 64)) / saved_bytes(lora, pictures(64, 64)))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[1] <= 0.45


def test_of_a_block_as_many_patches_are_kept_as_the_coarser_of_grid_and_map_has():
    model, kept = beside(vit(blocks=4, hidden_size=36, image_size=64, patch_size=4)).train(), set[int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.shape[2] == 36:
            kept.add(tensor.shape[1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**pictures(64, 64)).loss
    assert loss.requires_grad
    # and all of the last block's, of which the class token is updated
    assert kept - {16 * 16 + 1} == {8 * 8 + 1, 4 * 4 + 1, 2 * 2 + 1}


def test_a_backbone_that_requires_grad_is_named_once():
    model = adapted().train()
    model.get_base_model().vit.layers[1].base_layer.mlp.fc1.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"memory saving inactive: 'vit\.layers\.1\.mlp\.fc1\.weight' requires grad"):
        model(**pictures()).loss.backward()
    assert model.get_base_model().vit.layers[1].base_layer.mlp.fc1.weight.grad is not None


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("fields", [{"fusion": "replace"}, {"bits": 1}, PAPER], ids=str)
def test_what_is_saved_holds_the_statistics_of_the_batch_norms(fields, tmp_path):
    model = adapted(**fields)
    train(model, pictures())
    statistics = {name: b for name, b in model.named_buffers() if "running_" in name}
    assert len(statistics) == (2 if "bits" in fields else 4)
    assert all(b.abs().sum() > 0 and not torch.equal(b, torch.ones_like(b)) for b in statistics.values())
    expected = output(model, pictures())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert all(torch.equal(b, statistics[name]) for name, b in loaded.named_buffers() if name in statistics)
    assert torch.equal(output(loaded, pictures()), expected)


def test_one_bit_takes_convolutions_too_and_the_file_is_many_times_smaller(tmp_path):
    sizes = {}
    for bits in (1, 32):
        model = adapted(bits=bits, dims=[32, 48, 64, 72], heads=[2, 4, 8, 12])
        model.save_pretrained(tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "adapter_model.safetensors").stat().st_size
        matrices = [n for n, p in model.named_parameters() if "petune_hside" in n and p.dim() > 1]
        assert all(n.endswith(".map.weight") or ".exit.up." in n for n in matrices)
    assert sizes[1] < sizes[32] / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_batch_statistics_stay_in_float32_and_norms_run_as_the_base_of_fewer_bits_does(dtype):
    model = beside(vit().to(dtype), **PAPER).train()
    batch = pictures()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert {tensor.dtype for tensor in model.get_base_model().vit.layers[1]._norms().values()} == {dtype}
    statistics = {name: b for name, b in model.named_buffers() if "running_" in name}
    assert {b.dtype for b in statistics.values()} == {torch.float32}
    before = {name: b.clone() for name, b in statistics.items()}
    model.to(dtype)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


def test_a_copy_and_a_pickle_and_a_load_without_memory_are_the_same_model(tmp_path):
    model = adapted(**PAPER)
    train(model, pictures())
    expected = output(model, pictures())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True, low_cpu_mem_usage=True).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(output(twin, pictures()), expected)
        train(twin, pictures())
        assert torch.equal(output(model, pictures()), expected)


def test_unloading_leaves_the_base_without_hooks():
    model = adapted(**PAPER)
    unloaded = model.unload()
    assert torch.equal(output(unloaded, pictures()), output(vit(), pictures()))
    hooks = [m for m in unloaded.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert find_topology(unloaded).blocks == find_topology(vit()).blocks


def test_the_hugging_face_trainer_trains_and_saves_it(tmp_path):
    model = adapted(fusion="replace")
    batch = pictures(batch=6)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    start = output(model, batch)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    trained = output(model.eval(), batch)
    assert relative_error(trained, start) > 1e-3
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, batch), trained)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, PAPER], ids=["ours", "paper"])
def test_a_compiled_model_computes_and_trains_the_same(fields):
    model = adapted(blocks=2, **fields)
    expected = output(model, pictures())
    plain = gradients(model, lambda: model(**pictures()).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(output(compiled, pictures()), expected) <= TOLERANCE[torch.float32]
    grads = gradients(model, lambda: compiled(**pictures()).loss)
    assert grads.keys() == plain.keys()
    assert max(relative_error(grads[name], plain[name]) for name in plain) <= TOLERANCE[torch.float32]
