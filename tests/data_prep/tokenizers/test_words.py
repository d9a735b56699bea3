"""Which tokens make a word, for every kind of tokenizer."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer
from data_prep.tokenizers.words import word_joints

TEXT = (
    "Every miller remembers 1848 winters, café owls (and unforgettable storytellers) by the riverside; Göttingen too."
)


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the tokens of each word spell, without spaces and marks around it, of those with a letter or digit."""
    joints, groups = word_joints(tokenizer), []
    before = None
    for token in tokenizer.encode(text):
        if before is not None and joints[0][token] and joints[1][before]:
            groups[-1].append(token)
        else:
            groups.append([token])
        before = token
    spelled = (re.sub(r"^\W+|\W+$", "", tokenizer.decode(group)) for group in groups)
    return [word for word in spelled if word]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_words_are_those_of_the_text_however_it_is_cut(kind):
    texts = [TEXT, "a miller in winter, an owl by the river", "storytellers remember"] * 20
    size = {"wordpiece": 600, "unigram": 275}.get(kind, 320)
    tokenizer = train_tokenizer(iter(texts), TokenizerSettings(tokenizer_kind=kind, vocab_size=size))
    assert len(tokenizer.encode(TEXT)) > len(TEXT.split())
    assert words_of(tokenizer, TEXT) == re.findall(r"\w+", TEXT)
    assert not word_joints(tokenizer)[:, list(tokenizer.special_tokens.values())].any()


def test_a_tokenizer_of_bytes_is_refused_in_a_sentence():
    tokenizer = train_tokenizer(iter([TEXT]), TokenizerSettings(tokenizer_kind="bytes"))
    with pytest.raises(UserError, match="where a token is a byte, it is not known which tokens make a word"):
        word_joints(tokenizer)


def test_tokens_of_scripts_without_spaces_are_words_and_sentencepiece_marks_spaces():
    pieces = ["<unk>", "</s>", "▁I", "▁saw", "中", "国", "人", "s", "▁", "ab"]
    backend = Backend(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert words_of(tokenizer, "I saws 中国人 abs") == ["I", "saws", "中", "国", "人", "abs"]
