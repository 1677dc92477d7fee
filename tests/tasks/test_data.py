"""The data modules: which rows, which labels, which tensors, in which order, and what they refuse."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from petune.tasks.data import TextClassificationData, TextPairData
from petune.tasks.sources import DataError

PAIRS = str(Path(__file__).parents[1] / "data" / "docstring_pairs.jsonl")
ROWS = [{"text": "word " * (1 + 3 * i % 17), "label": ["low", "mid", "top"][i % 3]} for i in range(40)]


def make_tokenizer(**special):
    words = ["[PAD]", "[UNK]", "word", "other"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, **(special or {"pad_token": "[PAD]"}))


TOKENIZER = make_tokenizer()


def classes(rows=ROWS, **options):
    return TextClassificationData(TOKENIZER, dataset={"train": rows} if isinstance(rows, list) else rows, **options)


def pairs(**options):
    return TextPairData(TOKENIZER, **{"train_file": PAIRS, **options})


def numbers(loader):
    return torch.cat([batch["row"] for batch in loader]).tolist()


def test_a_classification_batch_is_padded_to_its_longest_text():
    data = classes(batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {"input_ids", "attention_mask", "labels"} <= set(batch)
    assert "row" not in batch, "a training batch holds what a model takes and no more"
    assert batch["input_ids"].shape == (8, int(batch["attention_mask"].sum(1).max()))
    assert batch["labels"].dtype == torch.int64


def test_labels_follow_their_texts_through_shuffling_and_bucketing():
    data = classes([{"text": "word " * (1 + i % 3), "label": f"{1 + i % 3} words"} for i in range(40)], batch_size=4)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert torch.equal(batch["attention_mask"].sum(1) - 1, batch["labels"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pair_batch_has_two_sides(num_workers):
    data = pairs(batch_size=7, num_workers=num_workers)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"query", "document"}
    assert {len(side["input_ids"]) for side in batch.values()} == {7}


def test_texts_are_cut_at_max_length():
    data = classes(max_length=5)
    data.setup("fit")
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 5


def test_two_texts_become_one_input():
    rows = {"train": [{"text": "word word", "other": "other", "label": i % 2} for i in range(20)]}
    data = classes(rows, text_pair_column="other")
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["input_ids"][0].tolist() == [2, 2, 3]


def test_columns_are_mapped():
    rows = {"train": {"sentence": ["word", "other"] * 10, "class": [1, 0] * 10}}
    data = classes(rows, text_column="sentence", label_column="class")
    data.setup("fit")
    assert data.labels == ["0", "1"]
    assert data.num_labels == 2


# ---- splits


def test_validation_rows_are_set_aside_in_equal_shares_of_the_labels():
    rows = [{"text": "word", "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    data = classes(rows, validation_split=0.1)
    data.setup("fit")
    aside = numbers(data.val_dataloader())
    assert Counter(rows[i]["label"] for i in aside) == {"common": 18, "rare": 2}
    assert numbers(data.val_dataloader()) == aside
    again, other = classes(rows, validation_split=0.1), classes(rows, validation_split=0.1, seed=1)
    again.setup("fit")
    other.setup("fit")
    assert numbers(again.val_dataloader()) == aside != numbers(other.val_dataloader())
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 180


def test_validation_alone_sets_aside_the_same_rows_as_fit():
    fit, validate = pairs(), pairs()
    fit.setup("fit")
    validate.setup("validate")
    assert numbers(fit.val_dataloader()) == numbers(validate.val_dataloader())


def test_a_label_with_a_single_row_does_not_stop_the_split():
    data = classes([*ROWS, {"text": "word", "label": "once"}])
    data.setup("fit")
    assert data.labels == ["low", "mid", "once", "top"]
    assert len(numbers(data.val_dataloader())) == 5


def test_given_validation_rows_go_before_a_split(tmp_path):
    Dataset.from_list(ROWS[:6]).to_csv(tmp_path / "validation.csv")
    data = classes(validation_file=str(tmp_path / "validation.csv"))
    data.setup("fit")
    assert sorted(numbers(data.val_dataloader())) == list(range(6))
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 40


def test_without_a_split_nothing_is_validated():
    data = classes(validation_split=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_evaluation_keeps_the_number_of_each_row():
    data = pairs(test_file=PAIRS, predict_file=PAIRS)
    data.setup("test")
    data.setup("predict")
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        found = numbers(loader)
        assert sorted(found) == list(range(200))
        assert found == numbers(loader) != sorted(found), "bucketed, the same way every time"


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_rows_to_predict_may_have_one_side(side, streaming):
    data = TextPairData(TOKENIZER, dataset={"predict": [{side: "word"}, {side: "other"}]}, streaming=streaming)
    data.setup("predict")
    assert set(next(iter(data.predict_dataloader()))) == {side, "row"}


def test_rows_to_predict_need_no_label():
    data = TextClassificationData(TOKENIZER, dataset={"predict": [{"text": "word"}]})
    data.setup("predict")
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_labels_are_known_before_any_tokenizer_is_loaded():
    data = TextClassificationData("no/such-model", dataset={"train": ROWS})
    assert data.labels == ["low", "mid", "top"]


def test_a_stream_gives_the_rows_of_the_table():
    table, stream = classes(validation_split=0.0), classes(streaming=True, labels=["low", "mid", "top"])
    seen = []
    for data in (table, stream):
        data.setup("fit")
        batches = list(data.train_dataloader())
        seen.append(
            Counter(
                (int(m.sum()), int(y)) for b in batches for m, y in zip(b["attention_mask"], b["labels"], strict=True)
            )
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("given", ["streaming", "IterableDataset"])
def test_a_stream_that_nobody_validates_warns(given):
    rows = {"train": Dataset.from_list(ROWS).to_iterable_dataset()} if given == "IterableDataset" else ROWS
    data = classes(rows, streaming=given == "streaming", labels=["low", "mid", "top"])
    with pytest.warns(UserWarning, match="Nothing is validated: a stream cannot be split; give validation_file"):
        data.setup("fit")


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_is_left_alone():
    tokenizer = make_tokenizer(eos_token="other")
    data = TextClassificationData(tokenizer, dataset={"train": ROWS})
    data.setup("fit")
    assert {2, 3} == {int(i) for batch in data.train_dataloader() for i in batch["input_ids"].unique()}
    assert tokenizer.pad_token is None


# ---- what is refused

BAD_OPTIONS = {
    "validation_split": ({"validation_split": 1.0}, "validation_split=1.0 is no share of the rows"),
    "max_length": ({"max_length": 0}, "max_length=0 leaves no token"),
    "num_workers": ({"num_workers": -1}, "num_workers=-1 is negative"),
    "batch_size": ({"batch_size": 0}, "batch_size=0 leaves nothing in a batch"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_make_no_sense_are_refused_at_once(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        classes(**options)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test_file=.*none\.csv does not exist"):
        classes(test_file=str(tmp_path / "none.csv"))


def test_a_label_seen_only_in_validation_is_named_with_its_row(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"text":"word","label":"low"}\n\n{"text":"word","label":"new"}\n')
    data = classes(validation_file=str(tmp_path / "val.jsonl"))
    message = r"val.jsonl, line 3: label 'new' is not among the labels of the training rows, \['low', 'mid', 'top'\]"
    with pytest.raises(DataError, match=message):
        data.setup("fit")


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_label_that_was_not_listed_is_named_with_its_row(streaming):
    data = classes(labels=["low", "mid"], streaming=streaming, validation_split=0.0)
    with pytest.raises(DataError, match=r"the train rows, row 3: label 'top' is not among labels=\['low', 'mid'\]"):
        data.setup("fit") or list(data.train_dataloader())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_stage_without_rows_says_how_to_give_them(stage):
    split = {"fit": "train", "validate": "validation"}.get(stage, stage)
    with pytest.raises(
        DataError, match=f"No {split} rows were given; give {split}_file, dataset with a split {split}"
    ):
        TextPairData(TOKENIZER).setup(stage)


def test_labels_without_training_rows_are_asked_for():
    with pytest.raises(DataError, match="none were given; give train_file or labels"):
        TextClassificationData(TOKENIZER, dataset={"test": ROWS}).setup("test")


def test_a_wrong_column_names_the_closest():
    with pytest.raises(DataError, match=r"query_column=querry is no column of docstring_pairs.jsonl, .* did you mean"):
        pairs(query_column="querry").setup("fit")


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match=r"validation_split=0\.9 takes 2 of the 2 rows of the train rows"):
        classes([{"text": "word", "label": i} for i in range(2)], validation_split=0.9).setup("fit")


def test_more_tokens_than_the_model_takes_are_refused():
    tokenizer = make_tokenizer(pad_token="[PAD]", model_max_length=64)
    data = TextClassificationData(tokenizer, dataset={"train": ROWS}, max_length=65)
    data.setup("fit")
    with pytest.raises(ValueError, match="max_length=65 is more than the 64 tokens"):
        data.train_dataloader()


def test_a_tokenizer_that_cannot_pad_is_refused():
    data = TextClassificationData(make_tokenizer(unk_token="[UNK]"), dataset={"train": ROWS})
    data.setup("fit")
    with pytest.raises(ValueError, match=r"neither a padding nor an end token; set tokenizer\.pad_token"):
        data.train_dataloader()


# ---- under Lightning


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(4, 3), nn.Dropout(0.2))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].clone())
        return self.net(batch["input_ids"]).mean(1).logsumexp(1).mean()

    def validation_step(self, batch, batch_idx):
        assert "row" in batch

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch["row"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_fit_validate_test_and_predict_run(streaming):
    rows = dict.fromkeys(["train", "validation", "test", "predict"], ROWS)
    data = classes(rows, labels=["low", "mid", "top"], streaming=streaming)
    module, run = Tiny(), trainer()
    run.fit(module, datamodule=data)
    assert len(module.seen) == 6
    run.validate(module, datamodule=data)
    run.test(module, datamodule=data)
    assert sorted(torch.cat(run.predict(module, datamodule=data)).tolist()) == list(range(40))


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_fit_without_validation_rows_runs(streaming):
    data = classes(streaming=streaming, labels=["low", "mid", "top"], validation_split=0.0)
    module = Tiny()
    trainer(max_epochs=1).fit(module, datamodule=data)
    assert len(module.seen) == 3


def test_overfitting_a_batch_sees_the_same_batch_every_epoch():
    module = Tiny()
    trainer(overfit_batches=1).fit(module, datamodule=classes())
    assert torch.equal(*module.seen)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("num_workers", [0, 2], ids=["no workers", "two workers"])
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize(
    ("step", "every"),
    [(2, {"every_n_train_steps": 1}), (6, {"every_n_epochs": 1})],
    ids=["middle of an epoch", "end of an epoch"],
)
def test_a_resumed_fit_sees_the_batches_that_were_left(tmp_path, streaming, num_workers, step, every):
    rows = {"train": ROWS, "validation": ROWS[:5]}

    def fit(checkpoint=None):
        options = {"streaming": streaming, "num_workers": num_workers, "batch_size": 7}
        data, module = classes(rows, labels=["low", "mid", "top"], **options), Tiny()
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, enable_version_counter=False, **every)
        trainer(enable_checkpointing=True, callbacks=[saver]).fit(module, datamodule=data, ckpt_path=checkpoint)
        return module.seen

    straight = fit()
    resumed = fit(tmp_path / f"step={step}.ckpt")
    assert len(straight) == 12
    assert len(resumed) == 12 - step
    assert all(torch.equal(a, b) for a, b in zip(straight[step:], resumed, strict=True))


# ---- from YAML


@pytest.mark.parametrize("kind", [TextClassificationData, TextPairData])
def test_every_argument_has_a_type_and_a_help_line(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    helps = {action.dest: action.help for action in parser._actions if action.dest.startswith("data.")}
    assert len(helps) > 15
    without = [name for name, text in helps.items() if not text or len(text) < 10]
    assert [name for name in without if name not in ("data.tokenizer.help",)] == []


def test_the_command_line_builds_the_same_object():
    parser = ArgumentParser()
    parser.add_class_arguments(TextPairData, "data")
    arguments = ["--data.tokenizer=a/b", f"--data.train_file={PAIRS}", "--data.batch_size=4", "--data.dataset=c/d"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert (data.tokenizer, data.files["train"], data.dataset) == ("a/b", PAIRS, "c/d")
    assert data._order.batch_size == 4
