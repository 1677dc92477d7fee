"""Every format gives the same rows, and every fault is named by file and line."""

import http.client
import json
import time

import datasets
import huggingface_hub.constants
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from petune.tasks import sources
from petune.tasks.batches import RowFormat, stream_rows
from petune.tasks.checks import Labels, check_columns, read_labels, text_lengths
from petune.tasks.sources import DataError, read_dataset, read_file, read_objects

ROWS = [
    {"text": "one", "label": "a"},
    {"text": 'two, with a comma\nand a "line"', "label": "b"},
    {"text": "NA", "label": "a"},  # a text, not a missing value
    {"text": "42", "label": "b"},
    {"text": "früh — 早い", "label": "a"},
]
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def write(path, rows):
    table = Dataset.from_list(rows)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        table.save_to_disk(path)
    return path


def texts(source, column="text"):
    """All texts of a source, each checked the way training checks them."""
    check_columns(source, {"text_column": column})
    if isinstance(source.rows, Dataset):
        text_lengths(source, column)
        return source.rows[column][:]
    return [row["text"] for row in stream_rows(source, RowFormat({"text": column}))]


@STREAMING
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "folder"])
def test_every_format_gives_the_rows_as_they_are(tmp_path, name, streaming):
    source = read_file(write(tmp_path / name, ROWS), asked="train_file", streaming=streaming)
    assert sorted(source.columns) == ["label", "text"]
    assert texts(source) == [row["text"] for row in ROWS]
    assert isinstance(source.rows, Dataset) is not streaming


@STREAMING
@pytest.mark.parametrize(
    "rows",
    [ROWS, {column: [row[column] for row in ROWS] for column in ROWS[0]}, Dataset.from_list(ROWS)],
    ids=["list of dicts", "dict of lists", "Dataset"],
)
def test_python_objects_give_the_same_rows(rows, streaming):
    source = read_dataset({"train": rows}, "train", streaming=streaming)
    assert texts(source) == [row["text"] for row in ROWS]
    assert read_dataset({"train": rows}, "test") is None


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_validation_split_is_found_under_its_usual_names(name):
    assert read_dataset({name: ROWS}, "validation").name == f"the {name} rows"


@STREAMING
def test_a_saved_folder_of_splits_is_read_by_split(tmp_path, streaming):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "both")
    by_file = read_file(tmp_path / "both", asked="test_file", split="test", streaming=streaming)
    by_name = read_dataset(str(tmp_path / "both"), "test", streaming=streaming)
    assert texts(by_file) == texts(by_name) == ["one", ROWS[1]["text"]]
    with pytest.raises(DataError, match=r"predict_file=.*both has no split predict, only train, test; give the path"):
        read_file(tmp_path / "both", asked="predict_file", split="predict")


def test_rows_of_unlike_keys_lose_no_column():
    assert read_objects([{"text": "a"}, {"text": "b", "extra": 1}], "the train rows").columns == ["text", "extra"]


FAULTS = {
    "malformed JSON": ("f.jsonl", '{"text":"a"}\n\n{"text": "b"\n', r"f.jsonl, line 3: malformed JSON \(Expecting"),
    "truncated last line": ("f.jsonl", '{"text":"a"}\n{"text":"b', "f.jsonl, line 2: malformed JSON"),
    "no object": ("f.jsonl", '{"text":"a"}\n[1, 2]\n', r"f.jsonl, line 2: is list \[1, 2\], not a JSON object"),
    "another type": ("f.jsonl", '{"text":"a"}\n\n{"text":5}', "f.jsonl, line 3: 'text' is int 5, but str in line 1"),
    "key missing": ("f.jsonl", '{"text":"a"}\n\n{"txt":"b"}\n', "f.jsonl, line 3: 'text' is missing or null"),
    "null": ("f.jsonl", '{"text":"a"}\n{"text":null}\n', "f.jsonl, line 2: 'text' is missing or null"),
    "blank": ("f.jsonl", '{"text":"a"}\n{"text":"  "}\n', "f.jsonl, line 2: 'text' is empty; give it a text"),
    "numbers": ("f.jsonl", '{"text":1}\n{"text":2}\n', "f.jsonl, line 1: 'text' is int 1, not a string"),
    "encoding": ("f.jsonl", b'{"text":"a"}\n{"text":"\xff"}\n', "f.jsonl, line 2: is not UTF-8; save"),
    "array, blank": ("f.json", '[{"text":"a"},\n{"text":""}]', "f.json, row 2: 'text' is empty"),
    "array, cut": ("f.json", '[{"text":"a"},\n{"text":"]', r"f.json, line 2: malformed JSON \(Unterminated"),
    "cell missing": ("f.csv", 'text,n\n"a\nb",1\n,2\n', "f.csv, line 4: 'text' is empty"),
    "row too long": ("f.csv", "text,n\na,1\nb,2,3\n", "f.csv, line 3: has 3 cells under 2 column names"),
    "all rows too long": ("f.csv", "text,n\na,b,1\nc,d,2\n", "f.csv, line 2: has 3 cells under 2 column names"),
    "quote left open": ("f.csv", 'text,n\na,1\n"b,2\n', "f.csv, line 3: is no CSV row"),
    "column twice": ("f.csv", "text,text\na,1\n", "f.csv, line 1: names column 'text' twice"),
    "CSV encoding": ("f.csv", b"text,n\nb,1\na\xff,1\n", "f.csv, line 3: is not UTF-8"),
    "header only": ("f.csv", "text,n\n", "f.csv has no rows; give at least one"),
    "no bytes": ("f.jsonl", "", "train_file=.*f.jsonl is an empty file"),
    "broken Parquet": ("f.parquet", "PAR1", "f.parquet: cannot be read"),
    "unknown format": ("f.xlsx", "text", "f.xlsx is of no known format; give a .csv"),
    "wrong column": (
        "f.csv",
        "txt,n\na,1\n",
        "text_column=text is no column of f.csv, which has txt, n; did you mean",
    ),
    "no such column": ("f.csv", "x,n\na,1\n", "f.csv, which has x, n; set text_column to one of them"),
}


@STREAMING
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_and_line(tmp_path, fault, streaming):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        texts(read_file(tmp_path / name, asked="train_file", streaming=streaming))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbftext,n\r\na,1\r\n")
    assert texts(read_file(tmp_path / "f.csv", asked="train_file")) == ["a"]


def test_a_missing_file_names_the_closest(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"train_file=.*trian\.jsonl does not exist; .* has train\.jsonl\."):
        read_file(tmp_path / "trian.jsonl", asked="train_file")
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.csv does not exist, and neither does its folder"):
        read_file(tmp_path / "nowhere" / "a.csv", asked="train_file")


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder without a saved dataset; give a \.csv"):
        read_file(tmp_path / "empty", asked="train_file")
    with pytest.raises(DataError, match=r"dataset=.*empty is a folder without a saved dataset"):
        read_dataset(str(tmp_path / "empty"), "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 5}], "the train rows, row 2: 'text' is int 5, but str in row 1"),
        ([{"text": "a"}, "b"], "the train rows, row 2: is str 'b'; give a dict"),
        ({"text": ["a"], "label": []}, r"columns differ in length \({'text': 1, 'label': 0}\)"),
        ([], "the train rows has no rows"),
        ("text", "are str; give a list of dicts"),
        ({"text": [{"a": 1}, [2]]}, "make no table"),
    ],
    ids=["types", "no dict", "lengths", "no rows", "text", "nested"],
)
def test_objects_that_make_no_table_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        read_dataset({"train": rows}, "train")


def test_a_hub_name_offline_says_where_it_was_looked_for():
    with pytest.raises(
        ConnectionError, match=r"dataset=no/such is no path here .* give dataset=PATH or train_file=PATH"
    ):
        read_dataset("no/such", "train")


@pytest.fixture
def online(monkeypatch):
    """As if nothing had been said about being offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_without_a_network_a_hub_name_does_not_hang(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="dataset=no/such is no path here"):
        read_dataset("no/such", "train")
    assert time.monotonic() - start < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "what was set for the call is undone"


def test_a_hub_that_answers_is_asked(online, monkeypatch):
    asked = []

    def answer(name, config, streaming):
        asked.append((name, config, huggingface_hub.constants.HF_HUB_OFFLINE))
        return {"train": Dataset.from_list(ROWS)}

    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert texts(read_dataset("some/name", "train", config="en")) == [row["text"] for row in ROWS]
    assert asked == [("some/name", "en", False)]


def test_an_error_page_is_an_answer_of_the_hub(monkeypatch):
    def refuse(request, timeout):
        raise sources.urllib.error.HTTPError(request.full_url, 403, "no", http.client.HTTPMessage(), None)

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    assert sources._hub_answers()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 2], ["2", "10"]),
        (["10", "2", "-1"], ["-1", "2", "10"]),
        ([True, False, True], ["false", "true"]),
    ],
    ids=["strings", "integers", "digits", "booleans"],
)
def test_labels_are_the_sorted_names_that_occur(values, names):
    source = read_objects({"label": values}, "the train rows")
    labels = read_labels(source, "label")
    assert labels.names == names
    assert labels.ids(source, "label").tolist() == [names.index(str(value).lower()) for value in values]


def test_class_labels_keep_their_order_and_names():
    features = Features(text=Value("string"), label=ClassLabel(names=["neg", "pos", "never"]))
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    labels = read_labels(read_objects(table, "x"), "label")
    assert labels.names == ["neg", "pos", "never"]
    assert labels.ids(read_objects(table, "x"), "label").tolist() == [1, 0]
    unlabelled = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    with pytest.raises(DataError, match="x, row 1: label missing in 'label'"):
        labels.ids(read_objects(unlabelled, "x"), "label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"label":"a"}\n{"label":null}\n', "f.jsonl, line 2: label missing in 'label'; give a non-empty string"),
        ('{"label":"a"}\n{"label":""}\n', "f.jsonl, line 2: label missing"),
        ('{"label":"a"}\n\n{"x":1}\n', "f.jsonl, line 3: label missing"),
        ('{"label":0.5}\n{"label":1.0}\n', "f.jsonl, line 1: label float 0.5 in 'label'"),
        ('{"label":"a"}\n{"label":"a"}\n', r"two labels or more, \['a'\] is too few; check label_column"),
    ],
    ids=["null", "empty", "key missing", "float", "one class"],
)
def test_bad_labels_are_named_by_line(tmp_path, content, message):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_labels(read_file(tmp_path / "f.jsonl", asked="train_file"), "label")


def test_a_label_listed_twice_is_refused():
    with pytest.raises(DataError, match=r"labels=\['a', 'b', 'a'\] names a label twice"):
        Labels(["a", "b", "a"], given=True)


def test_a_stream_is_not_read_whole_for_its_labels():
    with pytest.raises(DataError, match=r"the train rows is a stream .* list them in labels"):
        read_labels(read_objects(ROWS, "the train rows", streaming=True), "label")
