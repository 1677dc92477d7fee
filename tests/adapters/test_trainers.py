"""Every method under `transformers.Trainer` and TRL's `SFTTrainer`: train, stop, resume, reload."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import petune
from tests.adapters.cases import BY_NAME, CASES, Case
from tests.adapters.harness import assert_same_tensors, base_tensors, build, inputs, output, targets
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:memory saving inactive")  # ladder under gradient checkpointing
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_steps": 1}
STEPS, HALF = 4, 2
TEXTS = ["a b c d e", "b c d", "e f g h", "a i j", "c c a"]


def fresh(case: Case, family: str, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build(family), case.config(**targets(case), **fields))


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(trainer: Trainer, resume: Path | None = None) -> PeftModel:
    """Train, see that something was learned and the base left alone, and give the model."""
    model: Any = trainer.model
    start, before = adapter_of(model), base_tensors(model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert any(not torch.equal(p, start[name]) for name, p in adapter_of(model).items())
    assert_same_tensors(base_tensors(model), before)
    return model.eval()


def assert_adapter_alone(checkpoint: Path, prefix: str) -> None:
    weights = {path.name for path in checkpoint.iterdir() if path.suffix in {".safetensors", ".bin"}}
    assert weights == {"adapter_model.safetensors", "training_args.bin"}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert saved
    assert [name for name in saved if prefix not in name] == []


def assert_same_adapter(model: PeftModel, expected: PeftModel) -> None:
    ours, theirs = adapter_of(model), adapter_of(expected)
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) <= TOLERANCE[torch.float32]


# ---------------------------------------------------------------------------------------------- transformers.Trainer


def hf_trainer(model: torch.nn.Module, family: str, folder: Path) -> Trainer:
    """Five rows two by two: the checkpoint at step 2 is inside an epoch, and step 4 in the next."""
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=HALF, per_device_train_batch_size=2, learning_rate=5e-3, **QUIET
    )
    batch = FAMILIES[family].inputs(5, head="cls")
    return Trainer(model, arguments, train_dataset=[{n: v[i] for n, v in batch.items()} for i in range(5)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_hugging_face_trainer_resumes_as_if_it_had_not_stopped_and_peft_loads_what_it_saved(case, tmp_path):
    family = "bert" if "bert" in case.families else "vit"
    whole = train(hf_trainer(fresh(case, family, **case.resumable), family, tmp_path))
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    assert_adapter_alone(checkpoint, whole.base_model.prefix)
    resumed = train(hf_trainer(fresh(case, family, **case.resumable), family, tmp_path / "resumed"), checkpoint)
    assert_same_adapter(resumed, whole)
    loaded = PeftModel.from_pretrained(build(family), tmp_path / f"checkpoint-{STEPS}").eval()
    batch = inputs(family)
    assert torch.equal(output(loaded, batch), output(whole, batch))


# ------------------------------------------------------------------------------------------------- trl.SFTTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghij"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def sft_trainer(model: Any, folder: Path, config: Any = None, rows: Any = None, **options: Any) -> SFTTrainer:
    """TRL turns gradient checkpointing on."""
    fields: dict[str, Any] = {"max_steps": STEPS, "save_steps": HALF, "per_device_train_batch_size": 2, **options}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), max_length=16, learning_rate=5e-3, bf16=False, **{**QUIET, **fields}),
        train_dataset=Dataset.from_dict(rows or {"text": TEXTS}),
        peft_config=config,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("case", [one for one in CASES if "bert" in one.families], ids=lambda case: case.name)
def test_trls_sft_trainer_resumes_as_if_it_had_not_stopped_and_peft_loads_what_it_saved(case, tmp_path):
    def make(folder: Path) -> SFTTrainer:
        config = case.config(task_type="CAUSAL_LM", **targets(case), **case.resumable)
        return sft_trainer(build("llama", "lm"), folder, config)

    whole = train(make(tmp_path))
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    assert_adapter_alone(checkpoint, whole.base_model.prefix)
    assert_same_adapter(train(make(tmp_path / "resumed"), checkpoint), whole)
    loaded = PeftModel.from_pretrained(build("llama", "lm"), tmp_path / f"checkpoint-{STEPS}").eval()
    batch = inputs("llama", "lm")
    assert torch.equal(output(loaded, batch), output(whole, batch))


@pytest.mark.parametrize("case", [one for one in CASES if "bert" not in one.families], ids=lambda case: case.name)
def test_a_method_for_pictures_refuses_the_sft_trainers_model(case, tmp_path):
    with pytest.raises(ValueError, match=r"needs a plain ViT, .* LlamaForCausalLM is none; use LadderSideConfig"):
        sft_trainer(build("llama", "lm"), tmp_path, case.config(task_type="CAUSAL_LM"))


def test_a_fused_peft_lora_trains_under_sft_as_peft_does_and_plain_peft_loads_it(tmp_path):
    def adapted() -> PeftModel:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(build("llama", "lm"), config)

    plain, fused = adapted(), adapted()
    petune.fuse(fused)
    train(sft_trainer(plain, tmp_path / "plain"))
    train(sft_trainer(fused, tmp_path / "fused"))
    assert_same_adapter(fused, plain)
    loaded = PeftModel.from_pretrained(build("llama", "lm"), tmp_path / "fused" / f"checkpoint-{STEPS}").eval()
    assert {type(module).__module__.partition(".")[0] for module in loaded.modules()} <= {
        "peft",
        "transformers",
        "torch",
    }
    batch = inputs("llama", "lm")
    assert relative_error(output(loaded, batch), output(fused, batch)) <= TOLERANCE[torch.float32]


METHODS = ["lora", "bilora", "emoe", "pat", "ladder"]


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing_that_sft_learns(name, tmp_path):
    def run(checkpointing: bool) -> PeftModel:
        config = BY_NAME[name].config(task_type="CAUSAL_LM")
        options = {"gradient_checkpointing": checkpointing, "save_strategy": "no", "max_steps": 2}
        return train(sft_trainer(build("llama", "lm"), tmp_path, config, **options))

    assert_same_adapter(run(True), run(False))


def first_loss(trainer: SFTTrainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_sft_packs_into_one_sequence_do_not_see_each_other(name, tmp_path):
    def loss(**options: Any) -> float:
        case = BY_NAME[name]
        torch.manual_seed(1)
        model = get_peft_model(build("llama", "lm"), case.random_config(task_type="CAUSAL_LM"))
        once = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": len(TEXTS), **options}
        return first_loss(sft_trainer(model, tmp_path, **once))

    assert math.isclose(loss(packing=True), loss(), rel_tol=TOLERANCE[torch.float32])


def test_sft_learns_the_completion_alone_and_its_loss_is_the_cross_entropy_of_that(tmp_path):
    rows = {"prompt": ["a b c", "d"], "completion": [" e f", " g h i"]}
    model = get_peft_model(build("llama", "lm"), BY_NAME["lora"].random_config(task_type="CAUSAL_LM"))
    trainer = sft_trainer(model, tmp_path, rows=rows, max_steps=1, save_strategy="no")
    batch = next(iter(trainer.get_train_dataloader()))
    learned = sorted(trainer.processing_class.decode(row[row != -100]) for row in batch["labels"])
    assert learned == ["e f </s>", "g h i </s>"]
    logits = output(model.eval(), {name: batch[name] for name in ("input_ids", "attention_mask")})
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert math.isclose(first_loss(trainer), expected.item(), rel_tol=TOLERANCE[torch.float32])
