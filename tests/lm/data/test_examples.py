from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from lm.data.examples import Columns, Example, Labels, numbers_of, read_examples, stream_examples


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines (or a text as it is) and return the path."""

    def write(rows, name="task.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def labels(*names):
    return [Example(("x",), name, f"f.jsonl, line {n}") for n, name in enumerate(names, 1)]


def test_a_text_or_a_pair_of_texts_is_read_with_its_label_and_place(write):
    path = write([{"text": "good", "label": 1}, {"text": "bad", "label": 0}])
    assert read_examples(path, "classification") == [
        Example(("good",), "1", f"{path}, line 1"),
        Example(("bad",), "0", f"{path}, line 2"),
    ]
    path = write([{"text": "a", "text_pair": "b", "label": 1}])
    assert read_examples(path, "classification")[0].texts == ("a", "b")
    assert read_examples(path, "classification", Columns(text_pair=""))[0].texts == ("a",)
    path = write([{"s1": "a", "s2": "b", "score": 2}])
    assert read_examples(path, "regression", Columns("s1", "s2", "score"))[0] == Example(
        ("a", "b"), 2.0, f"{path}, line 1"
    )


def test_labels_are_the_same_from_every_kind_of_file(write):
    values = [1, 1.0, "1", True, "yes"]
    path = write([{"text": "x", "label": value} for value in values])
    assert [e.label for e in read_examples(path, "classification")] == ["1", "1", "1", "true", "yes"]
    assert read_examples(write("text,label\nx,1\n", "a.csv"), "classification")[0].label == "1"
    assert read_examples(write("text,label\nx,1.5\n", "a.csv"), "regression")[0].label == 1.5


def test_words_and_tags_may_be_lists_or_text(write):
    path = write([{"words": ["He", "ran"], "tags": ["P", "V"]}, {"words": "She sat", "tags": "P V"}])
    assert [(e.texts, e.label) for e in read_examples(path, "tokens")] == [
        (("He", "ran"), ("P", "V")),
        (("She", "sat"), ("P", "V")),
    ]
    with pytest.raises(UserError, match="line 1: there are 2 words, but 1 tags"):
        read_examples(write([{"words": "He ran", "tags": ["P"]}]), "tokens")


def test_a_choice_is_named_by_number_letter_or_text(write):
    rows = [{"text": "2 + 2?", "choices": ["three", "four"], "label": label} for label in (1, "1", "B", "b", "four")]
    assert {(e.texts, e.label) for e in read_examples(write(rows), "choice")} == {(("2 + 2?", "three", "four"), 1)}
    path = write("text,x,y,label\nq,one,two,0\n", "a.csv")
    assert read_examples(path, "choice", Columns(choices=("x", "y")))[0].texts == ("q", "one", "two")
    with pytest.raises(UserError, match='line 1: the answer "2" is none of the 2 choices'):
        read_examples(write([rows[0] | {"label": 2}]), "choice")
    with pytest.raises(UserError, match="is not a list of at least two texts"):
        read_examples(write([rows[0] | {"choices": ["x"]}]), "choice")


def test_an_instruction_has_a_prompt_and_a_response(write):
    path = write([{"prompt": "Say hello.", "response": "Hello."}])
    assert read_examples(path, "instruction") == [Example(("Say hello.", "Hello."), None, f"{path}, line 1")]
    assert next(stream_examples(path, "instruction")).texts == ("Say hello.",)


TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", ""), ("assistant", "Yes?")]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": role, "content": text} for role, text in TALK]},
        {"messages": json.dumps([{"role": role, "content": text} for role, text in TALK])},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TALK], "id": 1},
        {
            "messages": [
                {"role": role.replace("system", "developer"), "content": t, "tool_calls": None} for role, t in TALK
            ]
        },
        {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in TALK]},
        {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in TALK[1:]], "system": "Be brief."},
        {"conversations": [{"role": role, "content": text} for role, text in TALK], "system": None},
    ],
)
def test_conversations_have_their_usual_columns(write, row):
    path = write([row])
    roles, texts = zip(*TALK, strict=True)
    assert read_examples(path, "instruction") == [Example(texts, roles, f"{path}, line 1")]


def test_alpacas_columns_are_a_prompt_and_a_response(write):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Sing.", "output": "La.", "system": "You are a bird."},
    ]
    assert [(each.texts, each.label) for each in read_examples(write(rows), "instruction")] == [
        (("Add.\n1 2", "3"), None),
        (("Sing.", "La."), None),
        (("You are a bird.", "Sing.", "La."), ("system", "user", "assistant")),
    ]


def test_named_columns_are_taken_before_a_conversation(write):
    row = {"prompt": "a", "response": "b", "messages": [], "instruction": "c", "output": "d"}
    assert read_examples(write([row]), "instruction")[0].texts == ("a", "b")
    columns = Columns(prompt="instruction", response="output")
    assert read_examples(write([row | {"input": "x"}]), "instruction", columns)[0].texts == ("c\nx", "d")
    with pytest.raises(UserError, match='there is no column "question", "response"'):
        read_examples(write([{"messages": []}]), "instruction", Columns(prompt="question"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", '"messages" is missing or is not a list of messages'),
        (None, '"messages" is missing or is not a list of messages'),
        (["Hello"], '"messages" is missing or is not a list of messages'),
        ("[" * 100_000, '"messages" is missing or is not a list of messages'),
        ([], "has no message of the assistant's, so there is nothing to learn"),
        ([{"role": "user", "content": "a"}], "has no message of the assistant's, so there is nothing to learn"),
        ([{"role": "tool", "content": "a"}], 'message 1 of "messages": the role is "tool", not one of system, user,'),
        ([{"content": "a"}], "the role is null, not one of"),
        ([{"role": ["user"], "content": "a"}], "the role is "),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            'message 2 of "messages": "content"',
        ),
        ([{"role": "user", "content": None}], '"content" is missing or has no text'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], '"content" is missing or has no text'),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}], '"tool_calls" cannot be learned'),
        ([{"role": "assistant", "content": "\ud83d"}], "half of a surrogate pair"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused(write, messages, words):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError) as error:
        read_examples(write([good, {"messages": messages}]), "instruction")
    assert "line 2: " in str(error.value)
    assert words in str(error.value)


def test_without_labels_their_column_need_not_be_there_and_texts_may_be_empty(write):
    path = write([{"text": "a"}, {"text": ""}])
    assert [(e.texts, e.label) for e in stream_examples(path, "classification")] == [(("a",), None), (("",), None)]
    assert [e.texts for e in stream_examples(write("a\nb\n", "a.txt"), "classification")] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("classification", {"text": "x"}, 'line 2: "label" is missing'),
        ("classification", {"text": "x", "label": None}, 'line 2: "label" is missing'),
        ("classification", {"text": "x", "label": ""}, 'line 2: "label" is missing'),
        ("classification", {"text": " ", "label": 1}, 'line 2: "text" is missing or has no text'),
        ("classification", {"text": 3, "label": 1}, 'line 2: "text" is missing or has no text'),
        ("classification", {"text": "x", "label": 0.5}, 'line 2: "label" is 0.5, which is not a class'),
        ("classification", {"text": "x", "label": [1]}, "line 2: .* neither text nor a whole number"),
        ("classification", {"text": "\ud800", "label": 1}, "line 2: .* half of a surrogate pair"),
        ("regression", {"text": "x", "label": "high"}, 'line 2: "label" is "high", not a number'),
        ("regression", {"text": "x", "label": True}, "line 2: .* not a number"),
        ("regression", {"text": "x", "label": float("nan")}, "line 2: .* not a number"),
    ],
)
def test_an_invalid_example_is_reported_with_file_and_line(write, kind, row, words):
    with pytest.raises(UserError, match="task.jsonl, " + words):
        read_examples(write([{"text": "fine", "label": 1}, row]), kind)


def test_all_problems_are_reported_at_once_up_to_a_few(write):
    path = write([{"text": "x", "label": None}] * 7)
    with pytest.raises(UserError) as error:
        read_examples(path, "classification")
    lines = str(error.value).splitlines()
    assert (len(lines), lines[4], lines[5]) == (6, f'{path}, line 5: "label" is missing', "and 2 more like these")


def test_missing_columns_are_reported_with_those_that_exist(write):
    path = write([{"sentence1": "a", "sentence2": "b", "label": 1}])
    with pytest.raises(UserError, match='there is no column "text" in "sentence1", "sentence2", "label"'):
        read_examples(path, "classification")
    with pytest.raises(UserError, match="has no examples"):
        read_examples(write(""), "classification")


def test_classes_have_one_order_whatever_the_order_of_the_examples():
    assert Labels.of(labels("b", "a", "b")).names == ("a", "b")
    assert Labels.of(labels("10", "9", "-1")).names == ("-1", "9", "10")
    assert Labels.of([Example(("x", "y"), ("O", "B"), "f"), Example(("z",), ("O",), "f")]).names == ("B", "O")
    assert [Labels(("a", "b")).indices(example) for example in labels("b", "a")] == [[1], [0]]
    assert Labels(("B", "O")).indices(Example(("x", "y"), ("O", "B"), "f")) == [1, 0]


def test_a_label_that_was_not_trained_and_constant_labels_are_refused():
    with pytest.raises(UserError, match=r'f\.jsonl, line 1: the label "c" does not occur .* they have "a", "b"'):
        Labels(("a", "b")).indices(labels("c")[0])
    with pytest.raises(UserError, match=r'f\.jsonl, line 1 to line 2: every example has the label "a"'):
        Labels.of(labels("a", "a"))
    with pytest.raises(UserError, match=r'^data/x, train split: every example has the label "a"'):
        Labels.of([Example((), "a", "data/x, train split")] * 2)
    with pytest.raises(UserError, match=r'every example has the label "2\.0"'):
        numbers_of(labels(2.0, 2.0))
    assert numbers_of(labels(2.0, 3.0)) == [2.0, 3.0]


def test_columns_inside_of_columns_are_named_by_dots(tmp_path):
    rows = [{"translation": {"en": f"text {n}", "de": "x"}, "meta": {"label": n % 2}} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(text="translation.en", label="meta.label")
    found = read_examples(tmp_path / "a.jsonl", "classification", columns)
    assert [(each.texts, each.label) for each in found] == [((f"text {n}",), str(n % 2)) for n in range(3)]
    with pytest.raises(
        UserError, match=r'no column "text", "label" in "translation.en", "translation.de", "meta.label"'
    ):
        read_examples(tmp_path / "a.jsonl", "classification")
