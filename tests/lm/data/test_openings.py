from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.openings import Opening, openings


class Held:
    """A split of these texts, as a dataset holds them."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        self._tokens = np.array([t for text in texts for t in (*tokenizer.encode(text), tokenizer.end_of_text_id)])
        self.tokens = len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        return self._tokens[start:stop]


def of(texts: list[str], tokenizer: Tokenizer) -> list[Opening]:
    return openings(Held(texts, tokenizer), tokenizer)


def test_openings_are_the_first_words_of_documents(dataset):
    texts = [f"Number {n} of the documents, which goes on for a while.\nAnd on.\n" * 20 for n in range(9)]
    found = of(texts, dataset.tokenizer)
    assert [each.prompt for each in found] == ["Number 0 of the", "Number 4 of the", "Number 7 of the"]
    assert found[0].text == "Number 0 of the documents, which goes on for a while."
    assert found[0].fill == "Number 0 of the documents, [MASK] goes on for a while."


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("", None),
        ("\n\n \n", None),
        ("Title\n\nA line of several words.", ("A line of several", "A line of several words.")),
        ("no\nlong\nline", ("no", "no")),
        (
            "這是一個沒有空格的很長的句子這是一個沒有空格的很長的句子。",
            ("這是一個沒有空格", "這是一個沒有空格的很長的句子這是一個沒有空格的很"),
        ),
    ],
)
def test_lines_of_all_kinds_have_openings(text, opening, dataset):
    found = of([text], dataset.tokenizer)
    assert [each[:2] for each in found[:1]] == ([opening] if opening else [])
    assert all(each.fill.count("[MASK]") == 1 for each in found)


def test_one_long_document_is_opened_at_its_paragraphs(dataset):
    text = "\n".join(f"Paragraph {n} has these few words." for n in range(200))
    prompts = [each.prompt for each in of([text], dataset.tokenizer)]
    assert prompts[0] == "Paragraph 0 has these"
    assert len(prompts) == 3
    assert all(prompt.startswith("Paragraph ") and prompt.endswith(" has these") for prompt in prompts)


@given(texts=st.lists(st.text(max_size=60), max_size=6))
def test_any_text_has_openings_with_one_mask(texts, dataset):
    for opening in of([text.replace("[MASK]", "") for text in texts], dataset.tokenizer):
        assert opening.text.startswith(opening.prompt)
        assert opening.fill.count("[MASK]") == 1
        assert opening.prompt.strip() == opening.prompt != ""
