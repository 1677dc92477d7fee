"""What no task takes: texts longer than the model, columns that one file has alone, labels outside of the range."""

import pytest
import torch
from transformers import RobertaForTokenClassification

from petune.tasks import (
    QuestionAnsweringData,
    Seq2Seq,
    TextClassification,
    TextClassificationData,
    TextEmbedding,
    TextPairData,
    TokenClassificationData,
)
from petune.tasks.checks import check_label_ids
from petune.tasks.positions import max_tokens
from petune.tasks.seq2seq_data import Seq2SeqData
from petune.tasks.sources import DataError
from tests.tasks import tiny

TEXTS = {"train": [{"text": "w1 w2", "label": row % 2} for row in range(8)]}
PAIRS = {"train": [{"query": f"w{row}", "document": f"w{row + 20}"} for row in range(8)]}
WRITTEN = {"train": [{"source": f"w{row}", "target": f"w{row}"} for row in range(8)]}


def text_classification(folder, **options):
    data = TextClassificationData(tiny.tokenizer(), dataset=TEXTS, **options)
    return TextClassification(tiny.save_body(folder, max_position_embeddings=9), labels=["0", "1"]), data


def text_embedding(folder, **options):
    return TextEmbedding(tiny.save_body(folder, max_position_embeddings=9)), TextPairData(
        tiny.tokenizer(), dataset=PAIRS, **options
    )


def seq2seq(folder, max_length):
    model = tiny.save_body(folder, "bart", max_position_embeddings=9)
    return Seq2Seq(model), Seq2SeqData(
        tiny.tokenizer(), dataset=WRITTEN, max_source_length=max_length, max_target_length=4
    )


# ---- texts longer than the model


@pytest.mark.parametrize("make", [text_classification, text_embedding, seq2seq])
def test_a_max_length_beyond_the_positions_is_refused_however_short_the_texts(tmp_path, make):
    task, data = make(tmp_path / "base", max_length=10)
    with pytest.raises(
        ValueError, match=r"max_\w*length=10 is more than the 9 tokens that .*base has positions for; set"
    ):
        tiny.trainer(tmp_path).fit(task, datamodule=data)
    task, data = make(tmp_path / "base", max_length=9)
    tiny.trainer(tmp_path, max_steps=1).fit(task, datamodule=data)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_every_stage_refuses_it(tmp_path, stage):
    task, _ = text_classification(tmp_path / "base")
    data = TextClassificationData(
        tiny.tokenizer(), dataset={**TEXTS, "validation": TEXTS["train"], "predict": TEXTS["train"]}, max_length=10
    )
    with pytest.raises(ValueError, match="max_length=10 is more than the 9 tokens"):
        getattr(tiny.trainer(tmp_path), stage)(task, datamodule=data)


@pytest.mark.parametrize(
    ("make", "loader"),
    [
        (text_classification, [{"input_ids": torch.ones(2, 10, dtype=torch.int64), "labels": torch.tensor([0, 1])}]),
        (
            text_embedding,
            [{side: {"input_ids": torch.ones(2, 10, dtype=torch.int64)} for side in ("query", "document")}],
        ),
    ],
    ids=["texts", "pairs"],
)
def test_a_batch_of_someone_elses_loader_is_refused_by_its_own_length(tmp_path, make, loader):
    task, _ = make(tmp_path / "base")
    with pytest.raises(ValueError, match=r"a text of 10 tokens is longer than the 9 tokens that .*base has positions"):
        tiny.trainer(tmp_path).fit(task, torch.utils.data.DataLoader(loader, batch_size=None))


def test_roberta_counts_its_positions_from_the_padding_token_on(tmp_path):
    roberta = RobertaForTokenClassification(tiny.config("roberta", pad_token_id=1))
    assert max_tokens(roberta) == 38
    roberta(input_ids=torch.full((1, 38), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 39), 5))
    task = TextEmbedding(roberta.roberta, tokenizer=tiny.tokenizer())
    task.tokenizer.model_max_length = 1000
    assert task.encode([" ".join(["w1"] * 60)]).isfinite().all()  # cut at 38 tokens, not at 40


# ---- columns


CASES = [
    (TextClassificationData, TEXTS["train"], "label"),
    (TextPairData, PAIRS["train"], "document"),
    (Seq2SeqData, WRITTEN["train"], "target"),
    (TokenClassificationData, [{"tokens": ["w1"], "tags": [tag]} for tag in ("O", "B-A") * 2], "tags"),
    (
        QuestionAnsweringData,
        [{"question": "w1", "context": "w2", "answers": {"text": ["w2"], "answer_start": [0]}}] * 4,
        "context",
    ),
]


@pytest.mark.parametrize(("kind", "rows", "column"), CASES, ids=[kind.__name__ for kind, *_ in CASES])
def test_a_column_that_only_the_training_rows_have_is_named_with_both(kind, rows, column):
    less = [{name: value for name, value in row.items() if name != column} | {"extra": "w1"} for row in rows]
    lengths = {"max_source_length": 32} if kind is Seq2SeqData else {"max_length": 32}
    more = {"stride": 2} if kind is QuestionAnsweringData else {}
    data = kind(tiny.tokenizer(), dataset={"train": rows, "validation": less}, **lengths, **more)
    message = rf"_column={column} is no column of the validation rows, .*extra; give it the columns of the train rows"
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_columns_that_no_task_reads_may_differ(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,source\nw1,0,a\nw2,1,b\n")
    (tmp_path / "valid.jsonl").write_text('{"label": 1, "text": "w3"}\n')
    data = TextClassificationData(
        tiny.tokenizer(),
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "valid.jsonl"),
        max_length=8,
    )
    data.setup("fit")
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1]


def test_a_file_that_lacks_a_column_is_named_with_the_one_that_has_it(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nw1,0\nw2,1\n")
    (tmp_path / "valid.csv").write_text("text,lable\nw3,1\n")
    data = TextClassificationData(
        tiny.tokenizer(), train_file=str(tmp_path / "train.csv"), validation_file=str(tmp_path / "valid.csv")
    )
    with pytest.raises(
        DataError,
        match=r"label_column=label is no column of valid\.csv, which has text, lable; give it the columns of train",
    ):
        data.setup("fit")


# ---- labels


@pytest.mark.parametrize(("wrong", "row"), [(2, 1), (-1, 0)])
def test_a_label_outside_of_the_range_is_named_with_its_row(wrong, row):
    labels = torch.tensor([0, 1, 1])
    labels[row] = wrong
    with pytest.raises(
        ValueError, match=rf"labels hold {wrong} and Task has 2 classes from 0 on, first in row {row} of"
    ):
        check_label_ids(labels, 2, "Task")


def test_labels_that_do_not_count_may_be_outside_of_the_range():
    check_label_ids(torch.tensor([[0, -100], [1, 0]]), 2, "Task", ignored=-100)
    with pytest.raises(ValueError, match="labels hold -100"):
        check_label_ids(torch.tensor([[0, -100]]), 2, "Task")


@pytest.mark.parametrize("wrong", [2, -1])
def test_a_task_refuses_it_before_the_model_sees_it(tmp_path, wrong):
    task = TextClassification(tiny.classifier(), labels=["0", "1"], tokenizer=tiny.tokenizer())
    batch = next(iter(tiny.labelled(4, 4)))
    batch["labels"][3] = wrong
    with pytest.raises(ValueError, match=rf"labels hold {wrong} and TextClassification has 2 classes .* row 3 of"):
        tiny.trainer(tmp_path).fit(task, torch.utils.data.DataLoader([batch], batch_size=None))
