"""Examples become sequences that the model's context holds, and nothing of a text is read twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.examples import Example
from lm.finetuning.task_inputs import EncodedExample, Encoder, in_parts

LENGTH = 16


def example(*texts: str) -> Example:
    return Example(texts, None, "here")


def encoder(dataset, kind="classification", pooling="mean", windows=False, apart=False) -> Encoder:
    return Encoder(dataset.tokenizer, kind, LENGTH, pooling, windows, apart)


def test_a_text_is_read_from_all_of_its_positions_or_from_the_last(dataset):
    tokens = dataset.tokenizer.encode("the old fox")
    end = dataset.tokenizer.end_of_text_id
    for pooling, start in (("mean", 0), ("last", len(tokens))):
        (found,) = encoder(dataset, pooling=pooling).encode([example("the old fox")])
        assert found.sequences == ([end, *tokens],)
        ((span,),) = found.items
        assert (span.sequence, span.start, span.stop) == (0, start, len(tokens) + 1)
        assert not found.cut


def test_a_pair_is_one_sequence_with_the_end_of_text_between(dataset):
    (found,) = encoder(dataset).encode([example("a fox", "an owl")])
    first, second = (dataset.tokenizer.encode(text) for text in ("a fox", "an owl"))
    end = dataset.tokenizer.end_of_text_id
    assert found.sequences == ([end, *first, end, *second],)


@pytest.mark.parametrize("windows", [False, True])
def test_the_texts_of_a_pair_that_is_read_apart_are_as_if_alone(dataset, windows):
    texts = ("a fox", "an owl " * 20)
    reader = encoder(dataset, windows=windows, apart=True)
    (found,) = reader.encode([example(*texts)])
    first, second = reader.encode([example(text) for text in texts])
    assert found.sequences == first.sequences + second.sequences
    assert (found.joined, found.cut) == (2, True)
    for spans, alone, shift in ((found.items[0], first.items[0], 0), (found.items[1], second.items[0], 1)):
        assert [(s.sequence - shift, s.start, s.stop) for s in spans] == [(s.sequence, s.start, s.stop) for s in alone]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@given(count=st.integers(0, 60))
def test_windows_hold_each_token_once_and_truncation_the_first(dataset, pooling, count):
    text = " fox" * count
    tokens, end = dataset.tokenizer.encode(text), dataset.tokenizer.end_of_text_id
    (whole,) = encoder(dataset, pooling=pooling, windows=True).encode([example(text)])
    (cut,) = encoder(dataset, pooling=pooling).encode([example(text)])
    assert [token for sequence in whole.sequences for token in sequence[1:]] == tokens
    assert all(sequence[0] == end and len(sequence) <= LENGTH for sequence in whole.sequences)
    assert whole.cut == cut.cut == (len(tokens) > LENGTH - 1)
    assert cut.sequences == whole.sequences[:1]
    assert [span.sequence for span in whole.items[0]] == list(range(len(whole.sequences)))


@given(words=st.lists(st.sampled_from(["a", "fox", "", "grandmother", "x" * 70]), min_size=1, max_size=30))
def test_every_word_is_read_from_its_first_token(dataset, words):
    (found,) = encoder(dataset, "tokens").encode([example(*words)])
    assert len(found.items) == len(words)
    assert all(len(sequence) <= LENGTH for sequence in found.sequences)
    for number, (word, (span,)) in enumerate(zip(words, found.items, strict=True)):
        tokens = dataset.tokenizer.encode(" " * (number > 0) + word)[: LENGTH - 1]
        assert span.stop == span.start + 1
        if tokens:
            assert found.sequences[span.sequence][span.start : span.start + len(tokens)] == tokens


def test_each_choice_follows_the_text(dataset):
    (found,) = encoder(dataset, "choice").encode([example("which?", "an owl", "the barn", "a fox")])
    end, encode = dataset.tokenizer.end_of_text_id, dataset.tokenizer.encode
    texts = ("an owl", "the barn", "a fox")
    assert found.sequences == tuple([end, *encode("which?"), end, *encode(text)] for text in texts)
    assert [span.sequence for (span,) in found.items] == [0, 1, 2]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 30))
def test_parts_hold_at_most_so_many_tokens_and_every_example_once(lengths, most):
    encoded = [EncodedExample(([0] * length,), (), False) for length in lengths]
    parts = list(in_parts(encoded, most))
    assert [n for first, stop in parts for n in range(first, stop)] == list(range(len(lengths)))
    for first, stop in parts:
        assert sum(lengths[first:stop]) <= most or stop == first + 1
