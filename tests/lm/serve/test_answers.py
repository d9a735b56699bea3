from __future__ import annotations

import pytest

from lm.serve.answers import ChatShape, CompletionShape, Piece, Scored, join_pieces, token_name


def scored(tokenizer, text: str) -> tuple[Scored, ...]:
    return tuple(Scored(token, -1.5, [(token, -1.5)]) for token in tokenizer.encode(text))


def test_part_of_a_character_is_named_by_its_bytes(byte_dataset):
    tokenizer = byte_dataset.tokenizer
    assert [token_name(tokenizer, token) for token in tokenizer.encode("aé")] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
    assert token_name(tokenizer, tokenizer.end_of_text_id) == "<|endoftext|>"


@pytest.mark.parametrize("cuts", [[], [1], [2, 3], [1, 2, 3, 4, 5]])
def test_offsets_count_characters_across_pieces(byte_dataset, cuts):
    tokenizer = byte_dataset.tokenizer
    all_scored = scored(tokenizer, "né€x")
    shape = CompletionShape(tokenizer, [10], True)
    offsets = []
    for start, end in zip([0, *cuts], [*cuts, len(all_scored)], strict=True):
        offsets += shape.delta(0, Piece("", all_scored[start:end]))["logprobs"]["text_offset"]
    assert offsets == [10, 11, 11, 12, 12, 12, 13]  # n, the two bytes of é, the three of €, x


def test_the_actual_token_is_listed_with_the_most_likely_ones(byte_dataset):
    shape = CompletionShape(byte_dataset.tokenizer, [0], True)
    a, b, c = byte_dataset.tokenizer.encode("abc")
    logprobs = shape.delta(0, Piece("c", (Scored(c, -3.0, [(a, -1.0), (b, -2.0)]),)))["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -1.0, "b": -2.0, "c": -3.0}]
    assert (logprobs["tokens"], logprobs["token_logprobs"]) == (["c"], [-3.0])


def test_pieces_of_a_choice_are_joined(byte_dataset):
    first, second = scored(byte_dataset.tokenizer, "ab")
    whole = join_pieces([Piece("a", (first,), 1), Piece("", (), 0), Piece("b", (second,), 1, "stop")])
    assert whole == Piece("ab", (first, second), 2, "stop")


def test_chat_lists_tokens_only_if_they_are_requested(byte_dataset):
    shape = ChatShape(byte_dataset.tokenizer, True)
    (one,) = scored(byte_dataset.tokenizer, "é")[:1]
    content = shape.whole(0, Piece("", (one,), 1))["logprobs"]["content"]
    assert content[0]["bytes"] == [0xC3]
    assert ChatShape(byte_dataset.tokenizer, False).whole(0, Piece("a"))["logprobs"] is None
