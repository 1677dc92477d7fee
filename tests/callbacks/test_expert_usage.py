"""ExpertUsage: against choices recorded beside it, and against numbers computed by hand."""

import csv
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._subclasses import FakeTensorMode

from petune.adapters.emoe import EmoeConfig, Router
from petune.callbacks import ExpertUsage
from petune.callbacks.expert_counts import RouterHooks
from tests.callbacks import routed, runs
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]


def bare_router(num_experts=4, top_k=1):
    return Router(EmoeConfig(num_experts=num_experts, top_k=top_k), in_features=5, inner_size=12, fused=False, seed=0)


def scores(*experts, num_experts=4):
    """Scores of tokens that choose these experts, [tokens, num_experts]."""
    return torch.eye(num_experts)[list(experts)]


class Flat(nn.Module):
    """Routes its tokens without their batch dimension."""

    def __init__(self):
        super().__init__()
        self.router = bare_router()

    def forward(self, input_ids, attention_mask=None):
        return self.router(scores(*input_ids.flatten().tolist()))


def recorded(model, batch):
    """Pairs per expert of every router: by a hook, a loop over tokens and what the batch says of padding."""
    pairs, labels = {}, batch.get("labels")
    masks = {"decoder": labels != -100 if labels is not None and labels.dim() == 2 else None}

    def record(path):
        def hook(router, args, chosen):
            side = "decoder" if ".decoder." in path else "encoder"
            mask = masks.get(side, batch.get("attention_mask"))
            rows, tokens = chosen.shape[0], chosen.shape[1]
            mine = pairs.setdefault(path, [0] * router.num_experts)
            for row in range(rows):
                for token in range(tokens):
                    if mask is None or mask[row, token]:
                        for expert in chosen[row, token].tolist():
                            mine[expert] += 1

        return hook

    handles = [router.register_forward_hook(record(path)) for path, router in routed.routers(model).items()]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return list(pairs.values())


def share(pairs):
    return torch.tensor(pairs, dtype=torch.float64) / sum(pairs)


def test_load_entropy_and_overlap_are_what_they_say():
    usage, router = ExpertUsage(), bare_router()
    with usage.watch(router, task="a"):
        router(scores(0, 0, 1, 2))
    with usage.watch(router, task="b"):
        router(scores(1, 1))
        router(scores(3, 3))
    (a,), (b,) = usage.loads("a").values(), usage.loads("b").values()
    assert a.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert b.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert next(iter(usage.loads().values())).tolist() == [0.25, 0.375, 0.125, 0.25]
    assert list(usage.entropy_bits("a").values()) == [pytest.approx(1.5)]
    assert list(usage.entropy_bits("b").values()) == [pytest.approx(1.0)]
    assert list(usage.overlap("a", "b").values()) == [pytest.approx(0.25)]
    assert list(usage.overlap("a", "a").values()) == [pytest.approx(1.0)]
    assert usage.tasks() == ["a", "b"]


@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "gpt2", "llama", "phi3", "t5_gated", "bart", "whisper", "swin"]
)
def test_the_loads_are_the_shares_of_the_choices_without_padding(family):
    head = FAMILIES[family].heads[-1]
    model, batch = routed.model(family, head), routed.batches(1, family, head, rows=4)[0]
    if head == "lm":
        batch["labels"][1, -3:] = -100
    usage = ExpertUsage()
    with usage.watch(model), torch.no_grad():
        model(**batch)
    wanted = recorded(model, batch)
    assert len(wanted) >= 2
    for load, pairs in zip(usage.loads().values(), wanted, strict=True):
        torch.testing.assert_close(load, share(pairs))
    assert list(usage.loads()) == model.peft_config["default"].routed_modules


def test_a_decoders_own_mask_comes_before_its_labels():
    model, batch = routed.model("bart", "lm"), routed.batches(1, "bart", "lm")[0]
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    batch["decoder_attention_mask"][:, 2:] = 0
    batch["decoder_input_ids"] = batch["labels"].clone()
    batch["labels"][:, -1:] = -100
    usage = ExpertUsage()
    with usage.watch(model), torch.no_grad():
        model(**batch)
    wanted = recorded(model, {**batch, "labels": batch["decoder_attention_mask"] * 100 - 100})
    for load, pairs in zip(usage.loads().values(), wanted, strict=True):
        torch.testing.assert_close(load, share(pairs))


@pytest.mark.parametrize("way", ["keep_routing", "sparsify"])
def test_a_merged_model_is_counted_like_its_adapter(way):
    model, batch = routed.model("bert"), routed.batches(1)[0]
    adapter, merged = ExpertUsage(), ExpertUsage()
    with adapter.watch(model), torch.no_grad():
        model(**batch)
    model = model.sparsify() if way == "sparsify" else model.merge_and_unload(keep_routing=True)
    with merged.watch(model), torch.no_grad():
        model(**batch)
    assert merged.loads().keys() == adapter.loads().keys()
    for layer, load in merged.loads().items():
        torch.testing.assert_close(load, adapter.loads()[layer])


def test_cached_generation_counts_each_token_once_and_no_padding():
    model = routed.model("llama", "lm")
    ids, mask = torch.randint(3, 90, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[1, :3] = 0  # padded on the left
    usage = ExpertUsage()
    with usage.watch(model):
        new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4).shape[1] - 5
    pairs = [int(one.sum()) for one in usage._counts["watch"]["all"].values()]
    assert pairs == [(5 + 2 + 2 * (new - 1)) * routed.TOP_K] * 2


def test_tokens_without_a_batch_dimension_find_their_mask():
    model, usage = Flat(), ExpertUsage()
    ids, mask = torch.tensor([[0, 1, 2], [3, 3, 3]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with usage.watch(model):
        model(ids, mask)  # by position
    assert next(iter(usage.loads().values())).tolist() == [0.25] * 4


def test_a_layer_that_saw_padding_alone_has_no_load():
    model, usage = Flat(), ExpertUsage()
    with usage.watch(model):
        model(torch.tensor([[0, 1, 2]]), attention_mask=torch.zeros(1, 3))
    assert usage.loads() == {}


def test_a_mask_that_does_not_fit_is_said_once_and_all_tokens_count():
    model, batch = routed.model("bert"), routed.batches(1)[0]
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = batch["attention_mask"].bool()[:, None, None].repeat(1, 1, length, 1)
    usage = ExpertUsage()
    with usage.watch(model), torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(**batch)
        model(**batch)
    ours = [str(one.message) for one in said if "ExpertUsage" in str(one.message)]
    assert len(ours) == 2  # one for each layer
    assert "(3, 1, 11, 11)" in ours[0]
    assert "(3, 11)" in ours[0]
    pairs = [int(one.sum()) for one in usage._counts["watch"]["all"].values()]
    assert pairs == [2 * batch["input_ids"].numel() * routed.TOP_K] * 2


def test_two_adapters_on_a_layer_are_told_apart():
    model, batch = routed.model("bert"), routed.batches(1)[0]
    model.add_adapter("other", EmoeConfig(num_experts=6, top_k=1, layers=[1]))
    usage = ExpertUsage()
    with usage.watch(model), torch.no_grad():
        model(**batch)
        model.set_adapter("other")
        model(**batch)
    assert {layer: len(load) for layer, load in usage.loads().items()} == {
        "bert.encoder.layer.0.intermediate.dense": 4,
        "bert.encoder.layer.1.intermediate.dense (default)": 4,
        "bert.encoder.layer.1.intermediate.dense (other)": 6,
    }
    assert usage.figure().axes[0].images[0].get_array().shape == (3, 6)


def test_a_router_that_keeps_all_experts_is_left_out():
    model, batch, usage = routed.model("bert"), routed.batches(1)[0], ExpertUsage()
    next(iter(routed.routers(model).values())).top_k = routed.EXPERTS
    with usage.watch(model), torch.no_grad():
        model(**batch)
    assert list(usage.loads()) == ["bert.encoder.layer.1.intermediate.dense"]


def test_counting_goes_on_from_inference_mode_outside_of_it():
    router, usage = bare_router(), ExpertUsage()
    with usage.watch(router):
        with torch.inference_mode():
            router(scores(0))
        router(scores(1))
    assert next(iter(usage.loads().values())).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_counting_does_not_wait_for_the_device():
    with FakeTensorMode():  # refuses whatever needs a value: item(), bincount, masks as indices
        router = bare_router()
        hooks = RouterHooks(router)
        hooks.counts = {}
        hooks._masks[router] = torch.ones(2, 3)
        router(torch.randn(2, 3, 4))
    assert [one.shape for one in hooks.counts.values()] == [(4,)]


def test_a_compiled_model_counts_the_same():
    model, batch = routed.model("bert"), routed.batches(1)[0]
    wanted = [share(pairs) for pairs in recorded(model, batch)]
    model.compile(backend="eager")
    usage = ExpertUsage()
    with usage.watch(model), torch.no_grad():
        model(**batch)
    for load, pairs in zip(usage.loads().values(), wanted, strict=True):
        torch.testing.assert_close(load, pairs)


PROCESS = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from petune.callbacks.expert_counts import sum_over_processes
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
mine = [{"a": {"x": torch.tensor([1, 2])}}, {"b": {"x": torch.tensor([4, 8])}, "a": {"y": torch.tensor([16, 32, 64])}}]
torch.save(sum_over_processes(mine[rank]), store + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_counts_of_two_processes_are_summed_whatever_tasks_each_has_seen(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    wanted = {"a": {"x": [1, 2], "y": [16, 32, 64]}, "b": {"x": [4, 8]}}
    for rank in range(2):
        got = torch.load(tmp_path / f"store{rank}")
        plain = {task: {layer: pairs.tolist() for layer, pairs in counts.items()} for task, counts in got.items()}
        assert plain == wanted


# --- in a trainer ---


def csv_rows(folder):
    with (folder / "run" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def fit(usage, task, folder=None, train=None, val=None, epochs=2, **options):
    logger = CSVLogger(folder, name="run", version=0) if folder else False
    trainer = runs.trainer(usage, epochs=epochs, logger=logger, log_every_n_steps=1, **options)
    trainer.fit(task, routed.loader(train or routed.batches(3)), val)
    return trainer


def test_a_fit_logs_the_last_epoch_of_each_stage(tmp_path):
    task, usage, val = routed.Task(), ExpertUsage(), routed.batches(2, seed=40)
    fit(usage, task, tmp_path, val=routed.loader(val))
    wanted = ExpertUsage()
    with wanted.watch(task.model), torch.no_grad():
        for batch in val:
            task.model.eval()(**batch)
    loads = wanted.loads()
    assert usage.loads().keys() == usage.loads(stage="val").keys() == loads.keys()
    assert all(torch.equal(usage.loads(stage="val")[layer], load) for layer, load in loads.items())
    assert all(torch.equal(usage.loads()[layer], load) for layer, load in loads.items())  # what ran last is val

    layer, load = next(iter(loads.items()))
    rows = [row for row in csv_rows(tmp_path) if row.get(f"experts/val/{layer}/entropy_bits")]
    assert len(rows) == 2  # epochs
    last = {name: float(value) for name, value in rows[-1].items() if name.startswith(f"experts/val/{layer}/")}
    entropy = -sum(p * math.log2(p) for p in load.tolist() if p)
    assert last[f"experts/val/{layer}/entropy_bits"] == pytest.approx(entropy)
    assert last[f"experts/val/{layer}/max_load"] == pytest.approx(load.max().item())
    assert last[f"experts/val/{layer}/min_load"] == pytest.approx(load.min().item())
    assert any(row.get(f"experts/train/{layer}/entropy_bits") for row in csv_rows(tmp_path))


def test_the_sanity_check_is_not_counted():
    usage = ExpertUsage()
    fit(usage, routed.Task(), val=routed.loader(routed.batches(1)), check_val_every_n_epoch=5)
    with pytest.raises(ValueError, match="counted no stage 'val'; it counted train"):
        usage.loads(stage="val")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_epoch_of_training_counts_each_real_token_once(checkpointing):
    task, usage, train = routed.Task(), ExpertUsage(), routed.batches(3, rows=5)
    if checkpointing:
        task.model.gradient_checkpointing_enable({"use_reentrant": False})
        task.model.enable_input_require_grads()
    task.train()
    fit(usage, task, train=train)
    real = sum(int(batch["attention_mask"].sum()) for batch in train)
    assert [int(one.sum()) for one in usage._counts["train"]["all"].values()] == [real * routed.TOP_K] * 2


def test_the_tasks_of_a_validation_are_its_loaders_by_name(tmp_path):
    usage = ExpertUsage(tasks=["law"])
    val = [routed.loader(routed.batches(1, seed=seed)) for seed in (1, 2)]
    trainer = fit(usage, routed.Task(), tmp_path, val=val)
    assert usage.tasks("val") == ["law", "1"]
    assert usage.tasks("train") == ["all"]
    overlap = usage.overlap("law", "1", stage="val")
    assert len(overlap) == 2
    for layer, value in overlap.items():
        assert 0 < value <= 1
        assert float(trainer.callback_metrics[f"experts/val/{layer}/overlap/law/1"]) == pytest.approx(value)


def test_a_batch_names_its_task():
    usage, train = ExpertUsage(), routed.batches(3)
    for batch, name in zip(train, ("a", ["b", "b", "b"], "a"), strict=True):
        batch["task"] = name
    fit(usage, routed.Task(), train=train)
    assert usage.tasks("train") == ["a", "b"]


def test_a_batch_of_two_tasks_is_refused():
    train = routed.batches(1)
    train[0]["task"] = ["b", "a", "a"]
    with pytest.raises(MisconfigurationException, match="a batch holds the tasks a, b; give batches of one task each"):
        fit(ExpertUsage(), routed.Task(), train=train)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_counts_and_takes_its_hooks_off(stage):
    usage, task, batch = ExpertUsage(), routed.Task(), routed.batches(1)[0]
    before = routed.hooks(task)
    trainer = runs.trainer(usage)
    getattr(trainer, stage)(task, routed.loader([batch]), **({} if stage == "predict" else {"verbose": False}))
    for load, pairs in zip(usage.loads().values(), recorded(task.model, batch), strict=True):
        torch.testing.assert_close(load, share(pairs))
    logged = [name for name in trainer.callback_metrics if name.startswith("experts/")]
    assert len(logged) == (0 if stage == "predict" else 6)
    assert routed.hooks(task) == before


def test_the_hooks_go_when_a_fit_ends_and_when_it_fails():
    class Broken(routed.Task):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            raise RuntimeError("broken")

    usage, task, broken = ExpertUsage(), routed.Task(), Broken()
    before = routed.hooks(task)
    fit(usage, task, val=routed.loader(routed.batches(1)))
    assert routed.hooks(task) == before
    with pytest.raises(RuntimeError, match="broken"):
        fit(usage, broken)
    assert routed.hooks(broken) == before


def test_the_hooks_go_when_a_watched_block_fails():
    model = routed.model()
    before = routed.hooks(model)
    with pytest.raises(RuntimeError, match="broken"), ExpertUsage().watch(model):
        raise RuntimeError("broken")
    assert routed.hooks(model) == before


def test_what_runs_outside_of_a_batch_is_not_counted():
    class Curious(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module._loss(routed.batches(1)[0])

        on_fit_start = on_train_epoch_end

    usage, train = ExpertUsage(), routed.batches(2)
    fit(usage, routed.Task(), train=train, callbacks=[Curious(), usage])
    real = sum(int(batch["attention_mask"].sum()) for batch in train)
    assert [int(one.sum()) for one in usage._counts["train"]["all"].values()] == [real * routed.TOP_K] * 2


def test_the_measurement_changes_nothing_of_the_training():
    plain, measured = routed.Task(), routed.Task()
    measured.load_state_dict(plain.state_dict())
    runs.trainer(epochs=2).fit(plain, routed.loader(routed.batches(3)))
    fit(ExpertUsage(), measured)
    ours, theirs = measured.state_dict(), plain.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# --- the figure ---


def test_the_heat_map_has_a_row_for_each_layer_and_a_column_for_each_expert():
    model, usage = routed.model("bert"), ExpertUsage()
    with usage.watch(model), torch.no_grad():
        model(**routed.batches(1)[0])
    axes = usage.figure().axes[0]
    drawn = torch.tensor(axes.images[0].get_array().tolist(), dtype=torch.float64)
    torch.testing.assert_close(drawn, torch.stack(list(usage.loads().values())))
    assert [label.get_text() for label in axes.get_yticklabels()] == list(usage.loads())


# --- bad input ---


def test_a_model_without_routers_is_refused():
    message = r"ExpertUsage found no router in PeftModelFor\w+; put an EmoeConfig adapter on the model, or leave"
    with pytest.raises(MisconfigurationException, match=message):
        runs.trainer(ExpertUsage()).fit(runs.Module(), routed.loader([]))


def test_what_was_not_counted_is_named():
    usage, router = ExpertUsage(), bare_router()
    assert usage.loads() == {}
    with pytest.raises(ValueError, match="counted nothing to draw"):
        usage.figure()
    with usage.watch(router, task="a"):
        router(scores(0))
    with pytest.raises(ValueError, match="counted no task 'b'; it counted a"):
        usage.loads("b")
    with pytest.raises(ValueError, match="counted no stage 'val'; it counted watch"):
        usage.loads(stage="val")


def test_a_missing_matplotlib_is_named(monkeypatch):
    usage, router = ExpertUsage(), bare_router()
    with usage.watch(router):
        router(scores(0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'run: pip install "petune\[notebooks\]"'):
        usage.figure()
