from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pipeline import parts
from data_prep.pipeline.parts import count_words, encode_batch
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.encoders import EncoderError, make_encoder
from data_prep.tokenizers.training import train_tokenizer


@given(st.lists(st.sampled_from(["a", "é", " ", "\n", "\t", "語", "\r", "bc"])).map("".join))
def test_words_are_what_white_space_parts(text: str) -> None:
    assert count_words(text.encode()) == len(text.encode().split())


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_each_document_is_its_tokens_and_the_end_of_text(kind: str) -> None:
    texts = ["one two two", "", "é three three", "four"]
    tokenizer = train_tokenizer(iter(texts * 3), TokenizerSettings(kind, 262))
    encoded = list(encode_batch(texts, tokenizer, make_encoder("tokenizers", tokenizer)))
    assert [tokens.tolist() for tokens in encoded] == [
        [*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts
    ]
    assert {tokens.dtype for tokens in encoded} == {np.dtype("<u2")}


def test_batches_hold_all_documents_in_order_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BATCH_BYTES", 10)
    documents = [parts.Document("x" * size, str(size)) for size in (3, 3, 3, 3, 20, 1)]
    batches = list(parts._batches(iter(documents)))
    assert [document for batch in batches for document in batch] == documents
    assert [len(batch) for batch in batches] == [4, 1, 1]


class Panicking:
    short_name = "panicking"
    name = "panicking 1.0"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        raise BaseException("index out of bounds\nat line 7")


def test_an_encoder_that_panics_is_told_in_a_sentence() -> None:
    tokenizer = train_tokenizer(iter([]), TokenizerSettings("bytes"))
    with pytest.raises(
        EncoderError, match=r"panicking 1\.0 failed \(index out of bounds\): build again with --encoder"
    ):
        list(encode_batch(["text"], tokenizer, Panicking()))
