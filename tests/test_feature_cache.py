"""FeatureCache: blocks run once for each row, and the losses are those of a run without it."""

import copy
import shutil

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
from petune.feature_cache import FeatureCache
from petune.feature_tape import Replay
from tests import fresh
from tests.feature_runs import ROWS, Run, build, data, family, pick, without

CASES = [
    ("bert", "cls"),
    ("roberta", "lm"),
    ("gpt2", "cls"),
    ("llama", "lm"),
    ("qwen3", "cls"),
    ("t5", "lm"),
    ("bart", "cls"),
    ("bart", "lm"),
    ("whisper", "lm"),
    ("vit", "cls"),
    ("dinov2", "cls"),
    ("ast", "cls"),
    ("swin", "cls"),
]


def cached(run, **options):
    return FeatureCache(run.model, **{"rows": ROWS, "announce": None, **options})


@pytest.mark.parametrize(("name", "head"), CASES, ids=[f"{name}-{head}" for name, head in CASES])
def test_later_epochs_run_no_block_and_have_the_same_losses(name, head):
    run = Run(build(name, head))
    with cached(run) as cache:
        run.epochs(data(name, head), 1, 2, 3)
    assert run.forwards[0] > 0
    assert run.forwards[1:] == [0, 0]
    assert (len(cache._store.numbers), cache.rows_replayed, cache.rows_seen) == (0, 2 * ROWS, 3 * ROWS)
    assert run.losses == pytest.approx(without(name, head, 1, 2, 3).losses, rel=1e-5)
    assert len(set(run.losses)) == len(run.losses)  # the ladder learns


@pytest.mark.parametrize("name", ["vit", "ast"])
def test_a_pyramid_beside_the_blocks_is_trained_alike(name):
    runs = []
    for _ in range(2):
        base = family(name).build(head="cls")
        torch.manual_seed(5)
        runs.append(Run(get_peft_model(base, HierarchicalSideConfig()).train()))
    with cached(runs[0]):
        runs[0].epochs(data(name), 1, 2, batch_size=5)
    runs[1].epochs(data(name), 1, 2, batch_size=5)
    assert runs[0].forwards[1] == 0
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


def test_maps_of_features_are_read_too():
    model = get_peft_model(family("vit").build(), HierarchicalSideConfig()).train()
    pixels = data("vit")["pixel_values"]
    with FeatureCache(model, announce=None) as cache:
        ours, again = (model.base_model.features(pixel_values=pixels) for _ in range(2))
        assert cache.rows_replayed == ROWS
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, again, strict=True))


def test_only_the_blocks_that_are_read_are_kept():
    run = Run(build(side_layers=[1]))
    with cached(run) as cache:
        run.step(data())
        assert cache.blocks == {1, 3}  # and the last, whose hidden states go on to the head
        tokens = int(data()["attention_mask"].sum())
        assert cache.used_bytes == 2 * tokens * 32 * 4
        stored = [tensor for number in range(ROWS) for tensor in cache._store.read(number)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in stored) == cache.used_bytes


def test_other_batch_sizes_and_paddings_are_read_alike():
    run = Run(build())
    with cached(run):
        run.epochs(data(), 1, batch_size=4).epochs(data(), 2, batch_size=7).epochs(data(), 3, batch_size=1)
        run.step(data())  # all, padded to the longest
    assert run.forwards[1:] == [0, 0]
    reference = without("bert", "cls", 1).epochs(data(), 2, batch_size=7).epochs(data(), 3, batch_size=1)
    reference.step(data())
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize(("name", "head"), [("qwen3", "cls"), ("llama", "lm"), ("gpt2", "cls"), ("bert", "cls")])
def test_padding_on_the_left_changes_no_loss(name, head):
    batch = data(name, head)
    if head == "lm":  # a prompt has no labels; the first token's would be predicted from padding
        batch["labels"][:, :2] = -100
    run = Run(build(name, head))
    with FeatureCache(run.model, announce=None):
        run.epochs(batch, 1, 2, 3, side="left")
    reference = without(name, head, 1, 2, 3, batch=batch, side="left")
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    if name in ("qwen3", "llama"):  # rotary positions do not see how much padding there is
        assert run.forwards[1:] == [0, 0]
    else:
        assert run.forwards[0] > run.forwards[2]


def test_a_loss_on_padding_is_that_without_the_cache():
    batch = data("llama", "lm")
    batch["labels"] = torch.where(batch["attention_mask"] == 0, 3, batch["input_ids"])  # padding and first tokens too
    for side in ("left", "right"):
        run = Run(build("llama", "lm"))
        with FeatureCache(run.model, announce=None):
            run.epochs(batch, 1, 2, 3, 1, side=side)
        assert run.losses == pytest.approx(without("llama", "lm", 1, 2, 3, 1, batch=batch, side=side).losses, rel=1e-5)
        assert run.forwards[3] == 0  # batches that have come up as they are, padding and all


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-3)], ids=["fp16", "bf16"])
def test_half_precision_takes_half_the_room_and_changes_losses_by_its_rounding(dtype, tolerance):
    run, whole = Run(build()), Run(build())
    with cached(run, dtype=dtype) as half, cached(whole) as cache:
        run.epochs(data(), 1, 2)
        whole.epochs(data(), 1, 2)
        assert half.used_bytes < 0.55 * cache.used_bytes
    assert run.losses[:3] == whole.losses[:3]  # the epoch that records computes with what the blocks give
    assert run.losses[3:] == pytest.approx(whole.losses[3:], rel=tolerance)
    assert run.losses[3:] != whole.losses[3:]


def test_a_model_in_bfloat16_gets_its_own_dtype_back():
    run, reference = Run(build().bfloat16()), Run(build().bfloat16())
    with cached(run):
        run.epochs(data(), 1, 2)
    assert run.losses == reference.epochs(data(), 1, 2).losses
    assert run.forwards[1] == 0


OTHERS = [
    ("bert", "cls", "input_ids", lambda ids: ids.flip(1)),
    ("bert", "cls", "token_type_ids", lambda ids: 1 - ids),
    ("bert", "cls", "attention_mask", lambda mask: torch.cat([mask[:, :1], mask[:, 1:2] * 0, mask[:, 2:]], dim=1)),
    ("llama", "lm", "position_ids", lambda ids: ids + torch.arange(11) // 2),
    ("t5", "lm", "labels", lambda labels: labels.roll(1, 1)),
    ("whisper", "lm", "input_features", lambda features: features * 1.01),
    ("vit", "cls", "pixel_values", lambda pixels: pixels.bfloat16().float()),
]


@pytest.mark.parametrize(("name", "head", "what", "change"), OTHERS, ids=[f"{one[0]}-{one[2]}" for one in OTHERS])
def test_rows_are_other_rows_where_anything_differs_that_the_blocks_see(name, head, what, change):
    batch = data(name, head, rows=3)
    given = {"token_type_ids": torch.zeros(3, 11).long(), "position_ids": torch.arange(11).expand(1, 11)}
    batch = {**{one: given[one] for one in (what,) if one in given}, **batch}
    run = Run(build(name, head))
    with FeatureCache(run.model, announce=None) as cache:
        run.step(batch)
        run.step({**batch, what: change(batch[what])})
        assert cache.rows_replayed == 0
        assert len(cache) == 6
        run.step(batch)
        assert cache.rows_replayed == 3


def test_labels_of_rows_and_the_type_of_ids_make_no_other_rows():
    run, batch = Run(build()), data()
    with cached(run) as cache:
        run.step(batch)
        run.step({**batch, "labels": (batch["labels"] + 1) % 3, "attention_mask": batch["attention_mask"].int()})
        assert cache.rows_replayed == ROWS


# --- on disk ---


def test_a_folder_gives_what_memory_gives(tmp_path):
    run = Run(build("t5", "lm"))
    with cached(run, where=tmp_path / "features"):
        run.epochs(data("t5", "lm"), 1, 2)
    assert run.forwards[1] == 0
    assert run.losses == pytest.approx(without("t5", "lm", 1, 2).losses, rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == ["index.safetensors", "lock", "rows.bin"]


@pytest.mark.slow
def test_another_process_goes_on_with_a_folder(tmp_path):
    run = Run(build())
    with cached(run, where=tmp_path):
        run.epochs(data(), 1)
    done = fresh.run(fresh.script("tests.feature_runs"), tmp_path)
    assert done.code == 0, done.errors
    counts, losses = done.output.strip().splitlines()[-2:]
    # three batches, of which the first runs its four blocks to be compared
    assert counts == f"[4] {ROWS - 4} {ROWS}"
    assert [float(loss) for loss in losses.split()] == pytest.approx(without("bert", "cls", 7).losses, rel=1e-5)


def test_a_folder_for_more_blocks_is_filled_by_an_adapter_that_reads_fewer(tmp_path):
    for options, rows in (({}, slice(4)), ({"side_layers": [2]}, slice(4, 8))):
        run = Run(build(**options))
        with cached(run, where=tmp_path) as cache:
            run.step(pick(data(), torch.arange(ROWS)[rows]))
    assert cache.blocks == {1, 2, 3}
    run = Run(build())
    with cached(run, where=tmp_path) as cache:
        assert len(cache) == 8
        run.step(pick(data(), torch.arange(4)))
        run.step(pick(data(), torch.arange(8)))
        assert cache.rows_replayed == 8


def test_each_process_of_a_group_has_a_folder_and_a_share_of_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    run = Run(build())
    with cached(run, where=tmp_path) as cache:
        run.step(data())
        assert cache.max_bytes == pytest.approx(0.9 * shutil.disk_usage(tmp_path).free / 4, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["1-of-4"]


def test_a_killed_run_loses_the_rows_since_the_last_flush(tmp_path):
    run = Run(build())
    cache = cached(run, where=tmp_path)
    first, second = (pick(data(), torch.arange(ROWS)[rows]) for rows in (slice(4), slice(4, 8)))
    run.step(first)
    cache.flush()
    run.step(second)
    cache._store._file.flush()
    cache._store._lock.release()  # what the system does for a process that dies
    other = Run(build())
    with cached(other, where=tmp_path) as again:
        assert len(again) == 4
        other.step(first)
        other.step(second)
        other.step(second)
        assert again.rows_replayed == 4
        assert again.used_bytes == cache.used_bytes
    assert other.losses == pytest.approx(run.losses + other.losses[2:], rel=1e-5)


def test_rows_are_written_to_the_index_once_a_minute(tmp_path, monkeypatch):
    run = Run(build())
    with cached(run, where=tmp_path):
        run.step(pick(data(), torch.arange(3)))
        assert not (tmp_path / "index.safetensors").exists()
        monkeypatch.setattr("time.monotonic", lambda: 1e12)
        run.step(pick(data(), torch.arange(3, 5)))
        assert (tmp_path / "index.safetensors").exists()


# --- when it is used ---


def test_evaluation_and_generation_run_as_always():
    run = Run(build("llama", "lm"))
    with cached(run) as cache:
        run.epochs(data("llama", "lm"), 1)
        run.model.eval()
        batch = data("llama", "lm")
        seen = cache.rows_seen
        with torch.no_grad():
            inside = run.model(**batch).logits
            tokens = run.model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
        assert cache.rows_seen == seen
    with torch.no_grad():
        assert torch.equal(run.model(**batch).logits, inside)
        after = run.model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(after, tokens)


def test_a_closed_cache_leaves_nothing_on_the_model():
    model = build()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with FeatureCache(model, announce=None):
        Run(model).step(data())
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in build().modules()]
    assert hooks == after
    assert model.base_model.backbone.tape is None


def test_a_forward_that_fails_ends_its_batch():
    run = Run(build())
    with cached(run) as cache:
        with pytest.raises(IndexError):
            run.model(**{**data(), "input_ids": data()["input_ids"] + 1000})
        assert run.model.base_model.backbone.tape is None
        assert len(cache) == 0
        run.epochs(data(), 1, 2)
    assert run.forwards[1] == 0


def test_a_forward_without_the_adapter_is_the_base_models():
    run = Run(build())
    with cached(run) as cache:
        run.epochs(data(), 1)
        run.model.base_model.model.eval()  # the head has a dropout
        with run.model.disable_adapter():
            logits = run.model(**data()).logits
        assert torch.allclose(logits, family("bert").build(head="cls")(**data()).logits, atol=1e-6)
        assert cache.rows_seen == ROWS


def test_another_adapter_that_reads_the_same_blocks_shares_the_cache():
    run = Run(build())
    with cached(run) as cache:
        run.epochs(data(), 1)
        run.model.add_adapter("wide", LadderSideConfig(reduction_factor=2))
        run.model.set_adapter("wide")
        run.epochs(data(), 2)
        assert cache.rows_replayed == ROWS
    assert run.forwards[1] == 0


def test_rows_are_recorded_when_only_some_are_known():
    run = Run(build())
    with cached(run) as cache:
        run.step(pick(data(), torch.tensor([0, 1, 2])))
        run.step(pick(data(), torch.tensor([1, 2, 3, 3])))
        assert len(cache) == 4
        assert cache.rows_replayed == 0


def test_a_copy_of_the_model_has_no_cache():
    run = Run(build())
    with cached(run) as cache:
        run.step(data())
        twin = copy.deepcopy(run.model)
        seen = cache.rows_seen
        twin(**data()).loss.backward()
        assert cache.rows_seen == seen
        assert {hook.cache for hook in twin.base_model.model._forward_hooks.values() if hasattr(hook, "cache")} == {
            None
        }


def test_the_trunk_called_by_itself_is_cached_too():
    run = Run(build())
    with cached(run, rows=None):
        trunk = run.model.base_model.model.base_model
        inputs = {name: tensor for name, tensor in data().items() if name != "labels"}
        ours = [trunk(**inputs).last_hidden_state for _ in range(2)]
    mask = inputs["attention_mask"].bool()
    assert torch.allclose(ours[0][mask], ours[1][mask], atol=1e-6)
    assert run._count == 4


@pytest.mark.slow
def test_a_compiled_model_skips_its_blocks():
    run = Run(build(side_layers=[2]))
    run.model.base_model.model.compile(backend="eager")
    reference = Run(build(side_layers=[2]))
    with cached(run):
        for _ in range(3):
            run.step(data())
            reference.step(data())
    assert run._count == 4
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_batch_is_read_with_few_operators(name):
    run = Run(build(name))
    with cached(run) as cache:
        run.step(data(name))
        batch = cache._reader.read(run.model.base_model.model, (), data(name))
        rows = [cache._store.read(cache._store.numbers[digest]) for digest in batch.digests]
        with Operators() as operators:
            tape = Replay(cache._store.parts, rows, batch)
            for block in cache.blocks:
                tape.replay(block, torch.empty(ROWS, 11, 32))
        assert len(cache.blocks) == 3
        assert operators.count <= (1 + 3 * ROWS if name == "bert" else 1) + 1 + 2 * len(cache.blocks)
