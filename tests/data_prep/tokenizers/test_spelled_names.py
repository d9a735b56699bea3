from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.errors import UserError
from data_prep.tokenizers.encoders import ENCODERS, choose_encoder
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.spelled_names import texts_with
from data_prep.tokenizers.tokenizer import Tokenizer

LETTERS = "abs</>[]|#"
SPLITS: dict[str, Any] = {
    "none": None,
    "metaspace": pre_tokenizers.Metaspace(),
    "spaces": pre_tokenizers.WhitespaceSplit(),
    "whitespace": pre_tokenizers.Whitespace(),
    "bert": pre_tokenizers.BertPreTokenizer(),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "several": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits()]),
}
NORMALIZERS: dict[str, Any] = {
    "none": None,
    "lowercase": normalizers.Lowercase(),
    "nfkc": normalizers.NFKC(),
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}
names = st.text(st.sampled_from(LETTERS), min_size=2, max_size=5)


def model_of(kind: str, special: list[str]) -> models.Model:
    """A model that knows the names of special tokens as ordinary entries, and can form each from its letters."""
    entries = list(dict.fromkeys(["<unk>", *special, *LETTERS, "▁"]))
    if kind == "unigram":
        return models.Unigram([(entry, 0.0 if entry in special else -5.0) for entry in entries], unk_id=0)
    if kind == "bpe":
        merges = [(name[:n], name[n]) for name in special for n in range(1, len(name))]
        entries = list(dict.fromkeys([*entries, *(left + right for left, right in merges)]))
        vocabulary = {entry: n for n, entry in enumerate(entries)}
        return models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token="<unk>")
    vocabulary = {entry: n for n, entry in enumerate(entries)}
    if kind == "wordlevel":
        return models.WordLevel(vocabulary, unk_token="<unk>")
    return models.WordPiece(
        vocabulary | {f"##{c}": len(vocabulary) + n for n, c in enumerate(LETTERS)}, unk_token="<unk>"
    )


def file_with(kind: str, special: list[str], split: str = "none", normalizer: str = "none") -> str:
    backend = Backend(model_of(kind, special))
    backend.pre_tokenizer = SPLITS[split]
    backend.normalizer = NORMALIZERS[normalizer]
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", *special)])
    return str(backend.to_str())


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {*tokenizer.special_tokens.values()} - {tokenizer.unknown_id}


@given(
    kind=st.sampled_from(["unigram", "bpe", "wordlevel", "wordpiece"]),
    special=st.lists(names, min_size=1, max_size=3, unique=True),
    split=st.sampled_from(sorted(SPLITS)),
    normalizer=st.sampled_from(sorted(NORMALIZERS)),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_no_text_becomes_a_special_token(kind: str, special: list[str], split: str, normalizer: str, data: Any) -> None:
    assume(kind != "wordpiece" or not any(name.startswith("##") for name in special))
    content = file_with(kind, special, split, normalizer)
    tokenizer = Tokenizer.from_json(content)
    parts = st.sampled_from([*special, *(name.upper() for name in special), *LETTERS, " ", "\n", "c", "９"])
    for text in data.draw(st.lists(st.lists(parts).map("".join), max_size=20)):
        ids = tokenizer.encode(text)
        assert special_ids(tokenizer).isdisjoint(ids), text
        # A text without any name has the ids it had in the file.
        original = Backend.from_str(content)
        original.encode_special_tokens = True
        before = original.encode(text, add_special_tokens=False).ids
        if special_ids(tokenizer).isdisjoint(before) and not any(name.lower() in text.lower() for name in special):
            assert ids == before
    # Other programs still find the special tokens, by the same ids.
    read = Backend.from_str(tokenizer.to_json())
    for name in special:
        assert read.token_to_id(name) == original_id(content, name) == tokenizer.special_tokens[name]
        assert tokenizer.special_tokens[name] in read.encode(f"a {name} b").ids
    # The file is the one that was read, but for the special tokens that training needs.
    assert json.loads(tokenizer.to_json())["pre_tokenizer"] == json.loads(content)["pre_tokenizer"]
    assert Tokenizer.from_json(tokenizer.to_json()).sha256 == tokenizer.sha256


def original_id(content: str, name: str) -> int | None:
    found: int | None = Backend.from_str(content).token_to_id(name)
    return found


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordlevel", "wordpiece"])
def test_transformers_reads_a_saved_file_with_equal_ids(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    special = ["</s>", "[ab]"]
    tokenizer = Tokenizer.from_json(file_with(kind, special, "metaspace" if kind == "unigram" else "spaces"))
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("as / bab", "a < s", "", "absss|a"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.convert_tokens_to_ids(special) == [tokenizer.special_tokens[name] for name in special]
    assert theirs.convert_tokens_to_ids("</s>") in theirs.encode("as</s>a", add_special_tokens=False)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_a_spelled_name_keeps_its_characters() -> None:
    tokenizer = Tokenizer.from_json(file_with("unigram", ["</s>", "<s>"], "metaspace"))
    for text in ("a</s>b", "</s></s>", "<s>", "a <s></s> b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_name_that_no_cut_can_hide_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(file_with("bpe", ["#", "</s>"]), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"tokenizer\.json\" cannot be used: it encodes the text '#' as a special token"
    ) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["gpt2", "bytes"])
def test_encoders_agree_on_spelled_names_or_step_aside(split: str) -> None:
    """A byte-level model whose merges form the names of its special tokens."""
    special, letters = ["<|>", "ss"], sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("<|", ">"), ("s", "s")]
    vocabulary = {entry: n for n, entry in enumerate([*special, *letters, "<|"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = SPLITS[split], decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer = Tokenizer(backend)
    exact = []
    for name in ENCODERS:
        try:
            encoder = choose_encoder(tokenizer, ["a <|> b"], name).encoder
        except UserError:
            continue
        exact.append(name)
        for text in (text for each in special for text in texts_with(each)):
            ids = encoder.encode([text])[0].tolist()
            assert ids == tokenizer.encode(text) and special_ids(tokenizer).isdisjoint(ids)
            assert tokenizer.decode(ids) == text
    assert "tokenizers" in exact


def test_an_ordinary_added_word_that_ends_texts_becomes_special() -> None:
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken("</s>", special=False)])
    tokenizer = Tokenizer.from_json(str(backend.to_str()))
    assert tokenizer.end_of_text_id == 1
    assert 1 not in tokenizer.encode("a </s> a")


def test_nothing_is_cut_where_words_never_hold_a_name() -> None:
    tokenizer = Tokenizer.from_json(file_with("unigram", ["<|ab|>"], "gpt2"))
    assert not tokenizer.cuts_names
    assert tokenizer.description_in_use() == tokenizer.description


@pytest.mark.parametrize("name", ["</s>", "<pad>", "[MASK]"])
def test_unknown_text_is_no_token_that_training_needs(name: str) -> None:
    """Otherwise each unknown character would end a document."""
    entries = {entry: n for n, entry in enumerate([name, *LETTERS, "▁"])}
    backend = Backend(models.BPE(vocab=entries, merges=[], unk_token=name))
    with pytest.raises(UserError, match=f"encodes unknown text as '{re.escape(name)}', its special token"):
        Tokenizer(backend)
    # Byte-level models often name such a token, but nothing is unknown to them.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={e: n for n, e in enumerate([name, *letters])}, merges=[], unk_token=name))
    backend.pre_tokenizer, backend.decoder = SPLITS["gpt2"], decoders.ByteLevel()
    assert Tokenizer(backend).is_lossless
