"""The way out of pruning-aware tuning: the pruned model computes what the masked one did, and loads everywhere."""

import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from petune.adapters.pat import PatNorm
from petune.adapters.pat.prune import Pruning
from petune.export import export_merged
from petune.pruned import MARK, load_pruned
from tests import fresh
from tests.adapters.harness import Batch, build, inputs, output, snapshot
from tests.adapters.pat_models import (
    KEPT,
    PRUNABLE,
    WIDTH,
    config,
    expected_output,
    harden,
    last_head,
    masked,
    pat_train,
    shaken,
)
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES, TOKENS, VOCAB

EXACT = TOLERANCE[torch.float32]
STOCK = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "t5",
    "t5_gated",
    "vit",
    "deit",
    "dinov2",
    "ast",
)
COMPACT = ("bert", "roberta", "distilbert", "gpt2", "bart", "whisper")
LAYER_NORMS = ("bert", "roberta", "distilbert", "gpt2", "bart", "whisper", "vit", "deit", "dinov2", "ast")
HEADS = [pytest.param(name, head, id=f"{name}-{head}") for name in PRUNABLE for head in FAMILIES[name].heads]


def is_compact(model: nn.Module) -> bool:
    return getattr(model, "petune_pruned", None) is not None


# ------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_the_pruned_model_computes_what_the_masked_one_did(family, head):
    model, batch = masked(family, head), inputs(family, head)
    expected = expected_output(model, batch)
    pruned = model.merge_and_unload(safe_merge=True)
    assert relative_error(output(pruned, batch), expected) <= EXACT
    assert type(pruned) is type(build(family, head))
    assert is_compact(pruned) == (family in COMPACT or (family.startswith("t5") and head == "cls"))
    assert not [hook for m in pruned.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not any("petune" in name or "base_layer" in name for name in pruned.state_dict())


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("family", LAYER_NORMS)
def test_in_float64_the_fold_is_exact(family, variant):
    head = last_head(family)
    fields = {"variant": variant, "target_dim": 23}
    model, batch = masked(family, head, torch.float64, **fields), inputs(family, head, torch.float64)
    expected = expected_output(model, batch)
    found = output(model.merge_and_unload(), batch)
    assert found.dtype == torch.float64
    assert relative_error(found, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bf16_base_gives_a_bf16_model_to_its_rounding(family):
    head = last_head(family)
    model, batch = masked(family, head, torch.bfloat16), inputs(family, head)
    expected = expected_output(model, batch)
    pruned = model.merge_and_unload()
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert relative_error(output(pruned, batch), expected) <= 3e-2  # each of some ten layers rounds to 4e-3


@pytest.mark.parametrize("family", ["llama", "t5", "vit", "gpt2"])
def test_what_training_made_of_lora_head_and_mask_is_folded(family):
    head = "cls"
    names = {"llama": "score", "t5": "classification_head", "vit": "classifier", "gpt2": "score"}
    batch = inputs(family, head)
    torch.manual_seed(1)
    model = get_peft_model(shaken(family, head), config(modules_to_save=[names[family]]))
    pat_train(model, batch, 12)
    assert not torch.equal(*(copy.weight for copy in _copies_of_head(model, names[family])))
    expected = output(model, batch)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= EXACT


def _copies_of_head(model: PeftModel, name: str) -> list[Any]:
    head = getattr(model.get_base_model(), name)
    copies = [head.original_module, head.modules_to_save["default"]]
    return [getattr(copy, "dense", copy) for copy in copies]


@pytest.mark.parametrize(("family", "head"), [("vit", "classifier"), ("roberta", "classifier")])
def test_an_adapter_without_a_head_of_its_own_is_folded_with_the_bases(family, head):
    model, batch = masked(family, modules_to_save=[head]), inputs(family)
    torch.nn.init.normal_(_copies_of_head(model, head)[1].weight)
    model.add_adapter("second", config(init_weights=False))
    model.set_adapter("second")
    harden(model, seed=4)
    expected = output(model, batch)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= EXACT


@pytest.mark.parametrize("target_modules", [None, ["q_proj"]])
@pytest.mark.parametrize("r", [0, 4])
def test_with_any_lora_or_none_the_fold_is_the_same(r, target_modules):
    model, batch = masked("llama", "lm", r=r, target_modules=target_modules), inputs("llama", "lm")
    expected = output(model, batch)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= EXACT


# ----------------------------------------------------------------------------------------------------------- smaller


def test_the_number_of_parameters_is_that_of_the_smaller_width():
    pruned = masked("llama", "lm").merge_and_unload()
    inner, grouped, ffn = 32, 16, 48  # what attention and feed-forward keep
    block = KEPT * (inner + 2 * grouped) + inner * KEPT + 3 * KEPT * ffn + 2 * KEPT
    assert sum(p.numel() for p in pruned.parameters()) == 2 * VOCAB * KEPT + 2 * block + KEPT
    assert (pruned.config.hidden_size, pruned.config.head_dim, pruned.config.intermediate_size) == (KEPT, 8, 48)


@pytest.mark.parametrize("family", ["qwen3", "gemma", "t5", "gpt2", "bert"])
def test_tied_embeddings_come_apart_for_good(family):
    model = _tied(family)
    batch = inputs(family, "lm")
    base = model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    expected = output(model, batch)
    pruned = model.merge_and_unload()
    assert pruned.config.tie_word_embeddings is False
    assert pruned.get_input_embeddings().weight is not pruned.get_output_embeddings().weight
    pruned.tie_weights()
    assert relative_error(output(pruned, batch), expected) <= EXACT


def _tied(family: str) -> PeftModel:
    base = shaken(family, "lm")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    torch.manual_seed(1)
    model = get_peft_model(base, config(init_weights=False)).eval()
    harden(model)
    return model


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_pruned_model_generates_what_the_masked_one_did(family):
    model = masked(family, "lm")
    batch = {name: value for name, value in inputs(family, "lm").items() if name != "labels"}
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model.get_base_model().generation_config.repetition_penalty = 1.5
    expected = model.generate(**batch, **arguments)
    pruned = model.merge_and_unload()
    assert torch.equal(pruned.generate(**batch, **arguments), expected)
    assert pruned.generation_config.repetition_penalty == 1.5
    assert pruned.generation_config is not model.get_base_model().generation_config


def test_the_masked_model_is_unloaded_and_its_base_the_dense_one_again():
    base = shaken("llama", "lm")
    before = snapshot(base)
    model = get_peft_model(base, config(init_weights=False)).eval()
    harden(model)
    pruned = model.merge_and_unload()
    assert pruned is not base
    assert {name: torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_a_copy_is_merged_and_the_original_left_whole(tmp_path):
    for family in ("llama", "bert"):
        model, batch = masked(family), inputs(family)
        expected, before = output(model, batch), snapshot(model)
        export_merged(model, tmp_path / family)
        assert torch.equal(output(model, batch), expected)
        assert snapshot(model).keys() == before.keys()
        assert any(isinstance(module, PatNorm) for module in model.modules())


# ----------------------------------------------------------------------------------------- reloaded: stock and compact


def _phi() -> tuple[PreTrainedModel, Batch]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    about = AutoConfig.for_model("phi", vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(about).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.1)
    return model, {"input_ids": torch.randint(VOCAB, (2, TOKENS))}


RELOAD = """
import json, sys
sys.modules["petune"] = None  # from here on `import petune` is an ImportError
import torch, transformers
from pathlib import Path
torch.set_num_threads(1)
errors = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    seen = torch.load(folder / "seen.pt")
    with torch.no_grad():
        logits = model.eval()(**seen["batch"]).logits
    error = ((logits - seen["logits"]).norm() / seen["logits"].norm()).item()
    errors[folder.name] = [error, sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))]
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_transformers_alone_loads_the_stock_export_and_gives_the_same_logits(tmp_path):
    for family in COMPACT:  # with as many heads less
        head = "cls" if family in ("bert", "whisper") else last_head(family)
        model, batch = masked(family, head, target_dim=24, prune_heads=True), inputs(family, head)
        logits = output(model, batch)
        export_merged(model, tmp_path / "models" / family)
        torch.save({"batch": dict(batch), "logits": logits}, tmp_path / "models" / family / "seen.pt")
    for family in (*STOCK, "phi"):
        head = "cls" if family in ("qwen2", "gemma2") else last_head(family) if family != "phi" else "lm"
        if family == "phi":
            base, batch = _phi()
            model = get_peft_model(base, config(init_weights=False)).eval()
            harden(model)
        else:
            model, batch = masked(family, head), inputs(family, head)
        logits = output(model, batch)
        export_merged(model, tmp_path / "models" / family)
        assert not (tmp_path / "models" / family / MARK).exists()
        torch.save({"batch": dict(batch), "logits": logits}, tmp_path / "models" / family / "seen.pt")
    done = fresh.run(textwrap.dedent(RELOAD), tmp_path / "models", cwd=tmp_path)
    assert done.code == 0, done.errors
    errors = json.loads(done.output.splitlines()[-1])
    assert errors.keys() == {*STOCK, *COMPACT, "phi"}
    assert [name for name, (error, keys) in errors.items() if not error <= EXACT or keys] == []


def test_embeddings_that_come_apart_are_told_of(caplog):
    with caplog.at_level(logging.INFO, logger="petune"):
        masked("gemma", "lm").merge_and_unload()
        assert caplog.messages == [
            f"tie_word_embeddings set to False (+{VOCAB * KEPT} parameters): "
            "the embeddings were mapped, the head only cut."
        ]
        caplog.clear()
        masked("llama", "lm").merge_and_unload()
    assert caplog.messages == []


COMPACT_HEADS = [*((family, last_head(family)) for family in COMPACT), ("t5", "cls")]


@pytest.mark.parametrize(("family", "head"), COMPACT_HEADS, ids=lambda value: value)
def test_petune_loads_the_compact_export_and_gives_the_same_logits(family, head, tmp_path):
    model, batch = masked(family, head), inputs(family, head)
    expected = output(model, batch)
    report = export_merged(model, tmp_path / "out")
    mark = json.loads((tmp_path / "out" / MARK).read_text())
    assert mark == {"format": 1, "class": type(build(family, head)).__name__, "width": WIDTH, "kept": KEPT}
    loaded = load_pruned(tmp_path / "out")
    assert relative_error(output(loaded, batch), expected) <= EXACT
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    assert not loaded.training
    export_merged(model, tmp_path / "again")
    assert _weights(tmp_path / "again") == _weights(tmp_path / "out")


def _weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("family", COMPACT)
def test_a_stock_export_that_the_config_cannot_express_is_refused_and_the_model_left_adapted(family):
    head = last_head(family)
    model, batch = masked(family, head), inputs(family, head)
    expected = output(model, batch)
    name = type(model.get_base_model().config).__name__
    message = (
        rf"{name} cannot express head_dim != hidden_size / 4.*use export='compact', which petune\.load_pruned loads, "
        r"or train with prune_heads=True and round_to=8\."
    )
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(export="stock")
    assert torch.equal(output(model, batch), expected)


def test_a_width_that_the_heads_divide_gives_no_stock_model_of_smaller_heads():
    pruned = masked("bert").merge_and_unload()  # BertConfig(hidden_size=20) has heads of 5, the model heads of 8
    assert is_compact(pruned)
    assert pruned.bert.encoder.layer[0].attention.self.query.weight.shape == (32, KEPT)


def test_a_config_that_wants_heads_to_divide_the_width_is_heard():
    model, batch = masked("llama", "lm", target_dim=22), inputs("llama", "lm")
    expected = output(model, batch)
    message = r"LlamaConfig cannot express .*hidden size \(22\) is not a multiple of .* heads \(4\); .*target_dim"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(export="stock")
    pruned = model.merge_and_unload()
    assert is_compact(pruned)
    assert relative_error(output(pruned, batch), expected) <= EXACT


def test_a_compact_export_can_be_asked_for_where_a_stock_one_exists(tmp_path):
    model, batch = masked("llama", "lm"), inputs("llama", "lm")
    expected = output(model, batch)
    pruned = model.merge_and_unload(export="compact")
    assert is_compact(pruned)
    assert pruned is model.get_base_model()
    assert relative_error(output(pruned, batch), expected) <= EXACT


# --------------------------------------------------------------------------------------------------------- self-check


def test_a_wrong_fold_is_noticed_and_a_stock_export_leaves_the_model_adapted(monkeypatch):
    model, batch = masked("llama", "lm"), inputs("llama", "lm")
    expected = output(model, batch)
    monkeypatch.setattr(Pruning, "_mapped", lambda self, hybrid, columns: columns)  # the scale dropped
    with pytest.raises(RuntimeError, match=r"the pruned model differs from the masked one by \d"):
        model.merge_and_unload()
    monkeypatch.undo()
    assert torch.equal(output(model, batch), expected)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= EXACT


@pytest.mark.parametrize("broken", ["_cut_writer", "_cut_embedding", "_cut_reader"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_noise_in_any_part_of_a_fold_is_noticed(family, broken, monkeypatch):
    model, right = masked(family), getattr(Pruning, broken)
    noise = torch.Generator().manual_seed(7)

    def wrong(self: Pruning, *args: Any) -> torch.Tensor:
        tensor = right(self, *args)
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=noise)

    monkeypatch.setattr(Pruning, broken, wrong)
    with pytest.raises(RuntimeError, match="differs from the masked one"):
        model.merge_and_unload()


class Centred(nn.Module):
    """A head that looks at the mean over all channels, pruned ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(-1, keepdim=True))


def test_a_reader_of_the_stream_that_nobody_knows_is_noticed():
    base = shaken("llama", "lm")
    base.lm_head = Centred()
    base.config.tie_word_embeddings = False
    model = get_peft_model(base, config(init_weights=False)).eval()
    harden(model)
    with pytest.raises(RuntimeError, match=r"something in it reads or writes the residual stream.*report the arch"):
        model.merge_and_unload()
