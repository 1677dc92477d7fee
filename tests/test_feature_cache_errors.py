"""FeatureCache: what it refuses, and what it says."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import save_file

from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
from petune.feature_cache import FeatureCache
from tests.feature_runs import ROWS, Run, build, data, family, pick


def cached(model, **options):
    return FeatureCache(model, **{"rows": ROWS, "announce": None, **options})


def fill(folder, model=None, **options):
    """A folder with all rows in it."""
    run = Run(model or build())
    with cached(run.model, where=folder, **options):
        run.epochs(data(), 1)
    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": torch.float64},
            "FeatureCache.dtype=torch.float64 is not kept; use None, torch.float16 or torch.bf",
        ),
        ({"max_bytes": 0}, "FeatureCache.max_bytes=0 leaves room for nothing; use 1 or more, or None"),
        ({"rows": 0}, "FeatureCache.rows=0 leaves room for nothing; use 1 or more, or None"),
    ],
    ids=["dtype", "max_bytes", "rows"],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(build(), **options)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_model_without_a_side_network_is_refused(adapter):
    model = family("bert").build(head="cls")
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"found no side network in .*; put a LadderSideConfig adapter on the model"):
        cached(model)


def test_slim_t5_blocks_are_refused_for_the_position_bias_that_they_share():
    model = get_peft_model(family("t5").build(head="lm"), LadderSideConfig(reduction_factor=2, block="mirror"))
    with pytest.raises(ValueError, match=r"cannot be trained with a feature cache: its side blocks take"):
        cached(model)


def test_a_second_cache_on_a_model_is_refused():
    model = build()
    with cached(model), pytest.raises(ValueError, match=r"has a feature cache already; close\(\) it before another"):
        cached(model)
    with cached(model):
        pass


def test_blocks_whose_adapter_learns_inside_of_them_are_refused():
    model = get_peft_model(family("vit").build(head="cls"), HierarchicalSideConfig(detach=False))
    message = r"adapter 'default' cannot be trained with a feature cache: HierarchicalSideConfig.detach=False learns"
    with pytest.raises(ValueError, match=message):
        cached(model)


def test_parameters_of_the_blocks_that_require_grad_are_refused():
    model = build()
    bias = next(p for name, p in model.named_parameters() if name.endswith("attention.output.dense.bias"))
    bias.requires_grad_(True)
    message = "the frozen blocks have parameters that require grad, so what they give changes from step to step"
    with pytest.raises(ValueError, match=message):
        cached(model)
    bias.requires_grad_(False)
    run = Run(model)
    with cached(model):
        run.epochs(data(), 1)
        bias.requires_grad_(True)  # as callbacks do that unfreeze in time
        with pytest.raises(ValueError, match=message):
            run.step(data())


@pytest.mark.parametrize("when", ["recorded", "read"])
@pytest.mark.filterwarnings("ignore:memory saving inactive")
def test_embeddings_that_are_trained_are_refused(when):
    run = Run(build())
    with cached(run.model):
        if when == "read":
            run.epochs(data(), 1)
        run.model.enable_input_require_grads()
        with pytest.raises(ValueError, match=r"the hidden states around block [01] require grad, so they change"):
            run.step(data())
        assert run.model.base_model.backbone.tape is None


# --- size ---


def test_the_size_is_announced_once_from_the_first_batch(capsys):
    run = Run(build())
    with FeatureCache(run.model, rows=3200, dtype=torch.float16) as cache:
        run.epochs(data(), 1, 2)
        free = cache.max_bytes * 2 / 2**30
    found = capsys.readouterr().out
    pattern = (
        r"feature cache: 3,200 rows x 3 blocks x (\d+) tokens x 32 = ([\d.]+) MiB of float16 in RAM, (\S+) GiB free"
    )
    tokens, mib, gib = re.fullmatch(pattern, found.rstrip()).groups()
    assert 7 <= int(tokens) <= 11
    assert float(mib) == pytest.approx(3200 * 3 * int(tokens) * 32 * 2 / 2**20, rel=0.1)
    assert float(gib) == pytest.approx(free, rel=0.3)


def test_the_size_of_several_stacks_and_of_unknown_rows_is_announced():
    said = []
    run = Run(build("t5", "lm"))
    with FeatureCache(run.model, announce=said.append):
        run.step(data("t5", "lm"))
    pattern = (
        r"feature cache: \(\d blocks x 9 tokens x 32 \+ \d blocks x 9 tokens x 32\) = [\d.]+ KiB a row of float32 in "
        r"RAM, [\d.]+ GiB free, of which it takes [\d.]+ GiB at most"
    )
    assert len(said) == 1
    assert re.fullmatch(pattern, said[0])


def test_a_cache_that_will_not_fit_is_refused_with_the_number():
    said = []
    run = Run(build())
    cache = FeatureCache(run.model, rows=10**6, max_bytes=2**20, announce=said.append)
    message = r"does not fit: 1,000,000 rows x .* = [\d.]+ GiB of float32 in RAM, .* 1.0 MiB at most; keep it"
    with cache, pytest.raises(ValueError, match=message):
        run.step(data())
    assert said == []
    assert cached(build()).max_bytes > 2**20


def test_a_cache_that_grows_too_large_is_refused_with_the_number(tmp_path):
    for where in ("ram", tmp_path):
        run = Run(build())
        cache = FeatureCache(run.model, where=where, max_bytes=20_000, announce=None)
        place = "RAM" if where == "ram" else "the folder"
        message = (
            rf"the feature cache needs more than 19.5 KiB, all that it may take of {place}.*, after \d rows; keep it"
        )
        with cache, pytest.raises(ValueError, match=message):
            run.epochs(data(), 1)
        assert cache.used_bytes <= 20_000


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    for name, text in (("max", "3000000\n"), ("current", "2500000\n"), ("stat", "anon 7\ninactive_file 500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("petune.feature_store._CGROUP", tmp_path)
    with FeatureCache(build(), announce=None) as cache:
        assert cache.max_bytes == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    with FeatureCache(build(), announce=None) as cache:
        assert cache.max_bytes > 3_000_000


def test_values_beyond_float16_are_refused():
    run = Run(build())
    with torch.no_grad():
        run.model.base_model.model.bert.encoder.layer[1].get_base_layer().output.LayerNorm.weight.fill_(1e6)
    with (
        cached(run.model, dtype=torch.float16),
        pytest.raises(ValueError, match=r"block 1 gives values up to [\d,]+, and float16 ends at 65,504; keep them"),
    ):
        run.step(data())
    with cached(run.model, dtype=torch.bfloat16):
        run.step(data())


# --- other rows, other models ---


def test_inputs_that_change_from_epoch_to_epoch_are_refused():
    run = Run(build("vit"))
    batch = data("vit")
    with cached(run.model):
        run.epochs(batch, 1)
        batch["pixel_values"] = batch["pixel_values"].flip(-1)
        message = r"met 13 different rows, and the data set has 9: the inputs change from epoch to epoch \(random aug"
        with pytest.raises(ValueError, match=message):
            run.epochs(batch, 2)


def test_a_cache_of_other_data_is_refused_by_the_fingerprint_of_its_own(tmp_path):
    fill(tmp_path)
    run = Run(build())
    message = (
        r"keeps rows of other data \(fingerprint [0-9a-f]{16}\): none of them has come up, and the 9 rows of this"
    )
    with cached(run.model, where=tmp_path, rows=None), pytest.raises(ValueError, match=message):
        run.step(pick(data(seed=1), torch.arange(4)))
    with pytest.raises(ValueError, match="was made for a data set of 9 rows, and this one has 12; take the data that"):
        cached(build(), where=tmp_path, rows=12)
    with cached(run.model, where=tmp_path) as cache:  # what was refused has left nothing behind
        assert len(cache) == ROWS


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: build(seed=1), {}, "was made with a model of other weights; take the model that made it"),
        (lambda: build("roberta"), {}, "was made with a model of model_type bert, not roberta"),
        (lambda: build().bfloat16(), {}, "was made with a model of dtype float32, not bfloat16"),
        (lambda: build(side_layers=[0, 1]), {}, "keeps blocks 1, 2, 3, and the adapter reads block 0 too; take the"),
        (build, {"dtype": torch.float16}, "keeps the dtype of the model, and dtype=float16 was asked for"),
    ],
    ids=["weights", "type", "precision", "blocks", "dtype"],
)
def test_a_folder_of_another_model_is_refused_with_the_first_difference(tmp_path, model, options, message):
    fill(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(model(), where=tmp_path, **options)
    with cached(build(side_layers=[2]), where=tmp_path) as cache:  # reads fewer blocks
        assert len(cache) == ROWS


def test_weights_that_the_fingerprint_does_not_see_are_found_by_the_first_batch(tmp_path):
    fill(tmp_path)
    run = Run(build())
    with torch.no_grad():
        run.model.base_model.model.bert.embeddings.LayerNorm.weight.mul_(-1)  # a vector: it hashes matrices
    message = r"keeps hidden states that differ by \d+% from those of this model"
    with cached(run.model, where=tmp_path), pytest.raises(ValueError, match=message):
        run.step(data())


def test_a_model_that_gives_another_dtype_is_refused():
    run = Run(build())
    with FeatureCache(run.model, announce=None):
        run.step(data())
        run.model.double()
        message = r"RAM keeps float32 hidden states of width 32, of blocks \(1, 2, 3\), and the model gives float64"
        with pytest.raises(ValueError, match=message):
            run.step(data(seed=1))


def test_an_adapter_that_reads_other_blocks_is_refused():
    run = Run(build(side_layers=[2]))
    run.model.add_adapter("other", LadderSideConfig(reduction_factor=4, side_layers=[1]))
    with cached(run.model):
        run.step(data())
        run.model.set_adapter("other")
        message = (
            "adapter 'other' reads block 1, and the feature cache keeps blocks 2, 3, for adapter 'default'; close"
        )
        with pytest.raises(ValueError, match=message):
            run.step(data())


# --- folders ---


def test_a_folder_in_use_is_refused(tmp_path):
    with cached(build(), where=tmp_path), pytest.raises(ValueError, match="is in use by another process; wait for it"):
        cached(build(), where=tmp_path)
    cached(build(), where=tmp_path).close()


def test_a_damaged_folder_is_refused_and_let_go_of(tmp_path):
    fill(tmp_path)
    rows, index = tmp_path / "rows.bin", tmp_path / "index.safetensors"
    whole = index.read_bytes()
    rows.write_bytes(rows.read_bytes()[:-64])
    with pytest.raises(
        ValueError, match=r"rows.bin' has [\d,]+ bytes where its index names [\d,]+, so that it is not"
    ):
        cached(build(), where=tmp_path)
    index.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"index.safetensors' is no index of a feature cache; delete its folder"):
        cached(build(), where=tmp_path)
    index.unlink()
    with cached(build(), where=tmp_path) as cache:
        assert len(cache) == 0


def test_a_folder_of_another_format_is_refused(tmp_path):
    fill(tmp_path)
    index = tmp_path / "index.safetensors"
    with safe_open(index, "np") as file:
        head = json.loads(file.metadata()["petune"])
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    save_file(tables, index, metadata={"petune": json.dumps({**head, "format": 99})})
    with pytest.raises(ValueError, match="has format 99, this PETune reads format 1; delete the folder"):
        cached(build(), where=tmp_path)


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    run = Run(build())
    with cached(run.model, where=tmp_path):
        run.step(pick(data(), torch.arange(4)))
    before = (tmp_path / "index.safetensors").read_bytes()
    cache = cached(run.model, where=tmp_path)
    run.step(data())
    monkeypatch.setattr("petune.feature_store.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        cache.close()
    monkeypatch.undo()
    assert (tmp_path / "index.safetensors").read_bytes() == before
    with cached(build(), where=tmp_path) as again:
        assert len(again) == 4


# --- batches whose rows cannot be told ---


def test_a_batch_with_the_states_of_an_encoder_runs_as_always_with_a_warning():
    model = build("t5", "lm")
    batch = data("t5", "lm")
    with cached(model) as cache:
        encoded = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
        given = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        with pytest.warns(UserWarning, match="cannot tell the rows of a batch that comes with a KV cache") as found:
            losses = [model(**given).loss.item() for _ in range(2)]
        assert len([one for one in found if "cannot tell the rows" in str(one.message)]) == 1
        assert losses[0] == losses[1]
        assert cache.rows_seen == 0


def test_rows_that_the_blocks_do_not_keep_apart_are_refused():
    run = Run(build())
    batch = {name: tensor for name, tensor in data(rows=8).items() if name != "labels"}
    with cached(run.model):
        trunk = run.model.base_model.model.base_model

        def merge(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden.reshape(4, -1, 32),), {**kwargs, "hidden_states": None} if not args else kwargs

        trunk.encoder.layer[0].register_forward_pre_hook(merge, with_kwargs=True)
        batch.pop("attention_mask")
        message = r"block 1 gives hidden states \(4, 22, 32\) for 8 rows of \d+ tokens, so that rows cannot be told"
        with pytest.raises(ValueError, match=message):
            run.model(**batch)
