from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.encoders import choose_encoder
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.sentencepiece import convert_model
from data_prep.tokenizers.tokenizer import Tokenizer

ASCII = "".join(map(chr, range(33, 127)))
TEXTS = [f"The cat sat on the mat {n}, and the other cats sang\tof café {ASCII[n % 90 :]}" for n in range(200)]


@cache
def model(kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    chosen = {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=content,
        model_type=kind,
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **chosen,
    )
    return content.getvalue()


VARIANTS = [
    ("bpe", {}),  # as Llama 2 and Mistral
    ("bpe", {"add_dummy_prefix": False, "user_defined_symbols": ["<start>", "\n\n"]}),  # as Gemma
    ("bpe", {"byte_fallback": False}),
    ("bpe", {"remove_extra_whitespaces": True}),
    ("unigram", {}),
    ("unigram", {"byte_fallback": False, "add_dummy_prefix": False}),
]


def saved(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_a_model_and_its_tokenizer_json_give_the_same_ids(
    kind: str, options: dict[str, object], tmp_path: Path
) -> None:
    content = model(kind, **{name: value for name, value in options.items() if name != "user_defined_symbols"})
    if "user_defined_symbols" in options:
        content = model.__wrapped__(kind, **options)
    tokenizer = load_tokenizer(saved(tmp_path, content))
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in [*PROBES, *TEXTS[:20], *options.get("user_defined_symbols", [])]:
        assert tokenizer.encode(text) == processor.encode(text)
    assert Tokenizer.from_json(tokenizer.to_json()).sha256 == tokenizer.sha256
    assert tokenizer.end_of_text_id == processor.eos_id()
    # the two that the model lacks come after its last id
    assert {tokenizer.padding_id, tokenizer.mask_id} == {processor.vocab_size(), processor.vocab_size() + 1}


@given(text=st.text(st.sampled_from("the cats<>/\n\t é日0x4A1▁") | st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_the_ids_of_the_model(text: str) -> None:
    tokenizer, processor = converted()
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@cache
def converted() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    import tempfile

    content = model("bpe")
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(content)
        file.flush()
        tokenizer = Tokenizer.from_json(convert_model(Path(file.name)))
    return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=content)


def test_encoders_are_proven_for_converted_models_too() -> None:
    tokenizer, _ = converted()
    encoder = choose_encoder(tokenizer, TEXTS[:20]).encoder
    ids, _ = encoder.encode(TEXTS)
    assert ids.tolist() == [token for row in tokenizer.encode_batch(TEXTS) for token in row]


def test_a_model_whose_ids_cannot_be_met_is_refused_with_a_text(tmp_path: Path) -> None:
    folded = model("unigram", normalization_rule_name="nmt_nfkc")
    with pytest.raises(
        UserError, match=r"cannot be converted to an equivalent tokenizer\.json: '.*' is encoded differently"
    ):
        convert_model(saved(tmp_path, folded))


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only Unigram and BPE models are supported"):
        convert_model(saved(tmp_path, model("char")))
    with pytest.raises(UserError, match="it marks spaces in an unusual way"):
        convert_model(saved(tmp_path, model("bpe", treat_whitespace_as_suffix=True)))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "ends in a length"])
def test_a_damaged_model_is_a_user_error(damage: str, tmp_path: Path) -> None:
    content = {"empty": b"", "text": b"hello there", "cut": model("bpe")[:1000], "ends in a length": b"\x0a\xff"}[
        damage
    ]
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        convert_model(saved(tmp_path, content))
