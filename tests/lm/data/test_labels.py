"""A label means the same in every kind of file, and what could mean two things is refused."""

from __future__ import annotations

import csv
import json
import random
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.data.examples import Columns, Example, Labels, read_examples
from lm.data.labels import choice_of, class_name, number_of


def write_table(folder, rows):
    """Write rows as .jsonl, .csv, .tsv and .parquet; lists are JSON in the tables of text."""
    paths = [folder / f"table.{kind}" for kind in ("jsonl", "csv", "tsv", "parquet")]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for path, between in zip(paths[1:3], ",\t", strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=between, lineterminator="\n")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    return paths


def read_all(paths, task):
    return [[(each.texts, each.label) for each in read_examples(path, task)] for path in paths]


LABELS = st.one_of(
    st.lists(st.integers(-(10**15), 10**15), min_size=2),
    st.lists(st.integers(-(10**15), 10**15).map(float), min_size=2),
    st.lists(st.booleans(), min_size=2),
    st.lists(
        st.sampled_from(["yes", "no", " yes", "Grün", "None", "1", "1.0", "007", "1.5", "TRUE", "x,y"]), min_size=2
    ),
)


@settings(max_examples=40)
@given(labels=LABELS)
def test_the_same_table_gives_the_same_classes_from_every_kind_of_file(labels, tmp_path_factory):
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    found = read_all(write_table(tmp_path_factory.mktemp("t"), rows), "classification")
    assert found[1:] == found[:1] * 3
    assert [texts for texts, _ in found[0]] == [(row["text"],) for row in rows]


@settings(max_examples=20)
@given(numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2))
def test_the_same_table_gives_the_same_numbers_from_every_kind_of_file(numbers, tmp_path_factory):
    rows = [{"text": "x", "label": number} for number in numbers]
    found = read_all(write_table(tmp_path_factory.mktemp("t"), rows), "regression")
    assert found[1:] == found[:1] * 3
    assert [label for _, label in found[0]] == numbers


@settings(max_examples=40)
@given(data=st.data())
def test_the_same_table_gives_the_same_choices_from_every_kind_of_file(data, tmp_path_factory):
    """Or a table of texts is refused, where a text could also be a number."""
    names = st.sampled_from(["1", "2", "3", "4", "B", "the owl", "three"])
    choices = data.draw(st.lists(st.lists(names, min_size=3, max_size=4, unique=True), min_size=1, max_size=3))
    by_number = data.draw(st.booleans())
    right = [data.draw(st.integers(0, len(texts) - 1)) for texts in choices]
    rows = [
        {"text": "q", "choices": texts, "label": number if by_number else texts[number]}
        for texts, number in zip(choices, right, strict=True)
    ]
    for path in write_table(tmp_path_factory.mktemp("t"), rows):
        try:
            assert [each.label for each in read_examples(path, "choice")] == right
        except UserError as problem:
            assert "is the text of choice" in str(problem)
            assert path.suffix in (".csv", ".tsv") or any("B" in texts for texts in choices)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 1.0, "1", "1.0", " 1 ", "1.", Decimal("1.00")], "1"),
        ([-2, -2.0, "-2", "-2.0"], "-2"),
        ([0, -0.0, "0", "-0.0", "0.00"], "0"),
        ([True, "true", "True", "TRUE", " True"], "true"),
        ([False, "false", "False", "FALSE"], "false"),
        (["caf\u00e9", "cafe\u0301", " caf\u00e9\t"], "caf\u00e9"),
        (["007"], "007"),
        (["1.5"], "1.5"),
        (["+1"], "+1"),
        (["1e3"], "1e3"),
        (["nan"], "nan"),
        ([10**30, "1" + "0" * 30], "1" + "0" * 30),
    ],
)
def test_a_class_has_one_spelling(values, name):
    assert {class_name("label", value) for value in values} == {name}


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), float("inf"), 0.5, Decimal("0.5"), [1], {}, b"x"])
def test_what_is_no_class_is_refused(value):
    with pytest.raises(UserError, match=r'^"label" is'):
        class_name("label", value)


def test_labels_of_an_older_run_keep_their_spelling():
    kept = ("True", "1.0")
    assert [class_name("label", value, kept) for value in ("True", "1.0", True, "1", "TRUE")] == [
        *("True", "1.0", "true", "1", "true")
    ]


def test_a_file_is_read_with_the_spelling_of_an_older_run(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,True\ny,False\nz,true\n")
    assert [each.label for each in read_examples(path, "classification", kept=("False", "True"))] == [
        *("True", "False", "true")
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1,5", "1_000", "", "half", True, None, [1.0], 10**400, b"1"])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(UserError, match="not a number"):
        number_of("label", value)


def test_a_decimal_comma_is_named():
    with pytest.raises(UserError, match='"label" is "1,5", not a number: write a decimal point'):
        number_of("label", "1,5")


@pytest.mark.parametrize(
    ("first", "second"), [("1", "true"), ("false", "0"), ("1", "01"), ("+1", "1"), ("-3", "-03"), ("00", "false")]
)
def test_two_spellings_of_one_class_are_refused_with_both_places(first, second):
    examples = [Example(("x",), name, f"f.csv, line {n}") for n, name in enumerate(("a", first, "a", second), 1)]
    with pytest.raises(UserError, match=r"f\.csv, line 2, has the label .* and f\.csv, line 4, .* look like one class"):
        Labels.of(examples)
    with pytest.raises(UserError, match="does not occur in the training examples"):
        Labels((first, "a")).indices(examples[3])


def test_tags_that_are_alike_are_refused_but_other_numbers_are_not():
    with pytest.raises(UserError, match="look like one class"):
        Labels.of([Example(("x", "y"), ("1", "01"), "f.csv, line 1")])
    assert Labels.of([Example(("x", "y"), ("1", "10", "-1"), "f")]).names == ("-1", "1", "10")


NUMBERS = ("1", "2", "3", "4")


@pytest.mark.parametrize(
    ("answer", "choices", "typed", "right"),
    [
        ("2", NUMBERS, True, 1),  # a text of JSON, which would write the number as 2
        (2, NUMBERS, True, 2),
        (2.0, NUMBERS, True, 2),
        ("4", ("3", "4", "5"), True, 1),
        ("4", ("3", "4", "5"), False, 1),  # too large for a number
        ("0", ("0", "1", "2"), False, 0),  # text and number agree
        ("2", ("two", "three", "four"), False, 2),
        ("2.0", ("two", "three", "four"), False, 2),
        ("c", ("two", "three", "four"), False, 2),
        ("B", ("A", "B"), False, 1),
        ("three", ("two", "three", "four"), False, 1),
        (" three ", ("two", "three", "four"), False, 1),
        (True, ("False", "True"), True, 1),
        ("true", ("False", "True"), False, 1),
        ("1", ("B", "A"), False, 1),
    ],
)
def test_an_answer_is_named_by_number_letter_or_text(answer, choices, typed, right):
    assert choice_of("label", answer, choices, typed=typed) == right


@pytest.mark.parametrize(
    ("answer", "choices", "typed", "words"),
    [
        ("2", NUMBERS, False, "is the text of choice 1 and the number of choice 2: give the letter"),
        ("A", ("B", "A"), True, "is the text of choice 1 and the letter of choice 0: give the number"),
        ("A", ("B", "A"), False, "is the text of choice 1 and the letter of choice 0"),
        (4, NUMBERS, True, "none of the 4 choices"),
        (-1, NUMBERS, True, "none of the 4 choices"),
        ("9" * 5000, NUMBERS, False, "none of the 4 choices"),
        ("E", NUMBERS, False, "none of the 4 choices"),
        ("ß", NUMBERS, False, "none of the 4 choices"),
        (1.5, NUMBERS, True, "not a class"),
        (None, NUMBERS, True, "missing"),
        (True, NUMBERS, True, "none of the 4 choices"),
    ],
)
def test_an_answer_that_names_none_or_two_is_refused(answer, choices, typed, words):
    with pytest.raises(UserError, match=words):
        choice_of("label", answer, choices, typed=typed)


def test_a_column_of_answers_is_read_like_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,x,y,label\nq,owl,fox,fox\nq,owl,fox,1.0\nq,owl,fox,b\n")
    assert [each.label for each in read_examples(path, "choice", Columns(choices=("x", "y")))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("task", "row", "options"),
    [
        ("classification", {"sentence": "x"}, "--text-column and --label-column"),
        ("classification", {"text": "x"}, "--label-column"),
        ("regression", {"sentence": "x", "label": 1}, "--text-column"),
        ("instruction", {"question": "x", "output": "y"}, "--prompt-column and --response-column"),
        ("instruction", {"prompt": "x", "output": "y"}, "--response-column"),
        ("tokens", {"tokens": ["x"], "ner_tags": [0]}, "--words-column and --tags-column"),
        ("tokens", {"words": ["x"], "ner_tags": [0]}, "--tags-column"),
        ("choice", {"text": "x", "label": 0}, "--choices-column"),
    ],
)
def test_a_missing_column_is_named_with_its_own_option(tmp_path, task, row, options):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        read_examples(path, task)
    assert str(error.value).endswith(f"with {options}")


def test_order_of_rows_does_not_change_the_classes():
    names = ["true", "1.5", "grün", "-1", "10", "9"]
    examples = [Example(("x",), name, "f") for name in names]
    expected = Labels.of(examples)
    for seed in range(5):
        random.Random(seed).shuffle(examples)
        assert Labels.of(examples) == expected
