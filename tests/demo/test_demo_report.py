"""What the report says follows from the numbers."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from petune.demo.metrics import Interval
from petune.demo.report import Check, Comparison, DemoResult, Example, Row, choose_examples, outcome

BETTER, UNCLEAR, WORSE = Interval(0.06, 0.03, 0.09), Interval(0.01, -0.02, 0.04), Interval(-0.05, -0.08, -0.02)


def row(name, value, **fields):
    scores = {"R@1": value, "R@5": value + 0.2, "MRR": value + 0.1}
    return Row(name, fields.pop("kind", "baseline"), scores, Interval(value, value - 0.04, value + 0.04), **fields)


@pytest.fixture
def result():
    return DemoResult(
        task="retrieval",
        title="Which docstring?",
        settings={"seed": 7},
        reference="frozen",
        rows=[
            row("TF-IDF", 0.3, gain=WORSE),
            row("frozen", 0.5),
            row("lora", 0.56, kind="adapter", gain=BETTER, trainable_parameters=331_776, saved_bytes=1_340_000),
        ],
        comparisons=[Comparison("lora", "frozen", BETTER)],
        checks=[Check("saved and loaded again", 0.0, 1e-6)],
        examples=[Example("join(a, b)", "right", "wrong answer", "right")],
        outcomes={"wrong → right": 1},
        shown="lora",
        environment={"Python": "3.11.7"},
        seconds=42.0,
    )


def printed(result, width=80):
    console = Console(file=io.StringIO(), width=width)
    result.print(console)
    return console.file.getvalue()


def test_every_row_and_number_is_printed_in_eighty_columns(result):
    text = printed(result)
    for expected in ("TF-IDF", "frozen", "lora", ".560", ".52–.60", "+6.0", "+3.0…+9.0", "332 k", "1.3 MB"):
        assert expected in text
    assert "42 s, seed 7, Python 3.11.7" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_method_name_with_brackets_is_not_read_as_markup(result):
    result.rows.append(row("lora[bold]", 0.4, kind="adapter"))
    assert "lora[bold]" in printed(result, 120)


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (BETTER, "lora is better than the best baseline (frozen) in R@1: by +3.0 to +9.0 points (95% interval)."),
        (UNCLEAR, "lora is not shown to be better than the best baseline (frozen) in R@1: the 95% interval, -2.0 to"),
        (WORSE, "lora is worse than the best baseline (frozen) in R@1: by -8.0 to -2.0 points (95% interval); prefer"),
    ],
    ids=["better", "unclear", "worse"],
)
def test_the_conclusion_claims_what_the_interval_allows(result, difference, sentence):
    changed = replace(result, comparisons=[Comparison("lora", "frozen", difference)])
    assert changed.conclusion.startswith(sentence)
    assert sentence in " ".join(printed(changed).split())


def test_each_trained_row_has_a_line_of_the_conclusion(result):
    both = replace(result, comparisons=[Comparison("lora", "frozen", BETTER), Comparison("pat", "frozen", WORSE)])
    assert [line.split()[0] for line in both.conclusion.splitlines()] == ["lora", "pat"]


def test_a_failed_check_is_printed_as_failed(result):
    assert "saved and loaded again: largest difference 0.0e+00, ok" in printed(result)
    failed = replace(result, checks=[Check("merged", 0.5, 1e-4)])
    assert "merged: largest difference 5.0e-01, FAILED (allowed 0.0001)" in printed(failed)


def test_examples_show_both_hits_and_the_answer_that_was_missed(result):
    worse = replace(result, examples=[Example("join(a, b)", "right", "right", "other")])
    text = printed(worse)
    assert "Top hits of 1 queries, frozen → lora: wrong → right: 1." in text
    assert "✓ right" in text
    assert "✗ other" in text
    assert "answer   right" in text
    assert worse.examples[0].outcome == "right → wrong"


def test_the_first_query_of_each_outcome_is_shown_then_the_first_left():
    good, bad = outcome(True, True), outcome(True, False)
    assert choose_examples([good] * 6 + [bad]) == [0, 1, 2, 3, 6]
    assert choose_examples([bad, good]) == [0, 1]


def test_json_without_timings_depends_on_the_numbers_only(result):
    slower = replace(result, seconds=99.0, rows=[replace(found, seconds=9.0) for found in result.rows])
    assert slower.to_json(timings=False) == result.to_json(timings=False)
    assert slower.to_json() != result.to_json()
    values = json.loads(result.to_json())
    assert values["rows"][2]["scores"]["R@1"] == 0.56
    assert values["conclusion"] == result.conclusion
    assert values["checks"][0]["passed"] is True


def test_a_row_is_found_by_name(result):
    assert result.row("lora").trainable_parameters == 331_776
    with pytest.raises(KeyError, match=r"no row 'pat'; it has TF-IDF, frozen, lora"):
        result.row("pat")
