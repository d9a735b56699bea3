from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.tokenizer_training import TokenizerSettings, train_tokenizer
from data_prep.tokenizers import Tokenizer
from lm import masks
from lm.config import ModelConfig
from lm.generate import Sampling, continue_text, continue_tokens, fill_masks, filtered, stream_text
from lm.model import Transformer

GREEDY = Sampling(temperature=0, max_new_tokens=40)
# Scores apart from each other, so that every rank is clear.
SCORES = st.permutations(range(12)).flatmap(
    lambda order: st.floats(0.05, 1).map(lambda gap: torch.tensor(order, dtype=torch.float64) * gap)
)


@pytest.fixture(scope="module")
def model(trained) -> Transformer:
    return trained.load_model(torch.device("cpu"))


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return train_tokenizer(iter([]), TokenizerSettings("bytes"))


def restless_model(vocab_size: int, seed: int = 0) -> Transformer:
    """An untrained model whose choices depend on all it reads."""
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=vocab_size, tie_embeddings=False)
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def kept_by(scores: torch.Tensor, sampling: Sampling) -> set[int]:
    """The tokens that may be drawn, by the words of the definitions."""
    probability = [math.exp(score / sampling.temperature) for score in scores.tolist()]
    ranked = sorted(range(len(probability)), key=lambda token: -probability[token])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    if sampling.top_p < 1:
        total, reached, nucleus = sum(probability[token] for token in ranked), 0.0, []
        for token in ranked:
            if reached >= sampling.top_p:
                break
            nucleus.append(token)
            reached += probability[token] / total
        ranked = nucleus
    return {token for token in ranked if probability[token] >= sampling.min_p * probability[ranked[0]]}


@given(
    scores=SCORES,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
)
@hypothesis_settings(max_examples=100)
def test_filters_keep_what_their_definitions_say(scores, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    result = filtered(scores, sampling)
    kept = {token for token in range(12) if math.isfinite(result[token])}
    assert kept == kept_by(scores, sampling)
    for token in kept:
        assert float(result[token]) == pytest.approx(float(scores[token]) / temperature)


def test_filters_act_on_each_row_of_a_batch():
    rows = torch.randn(3, 9)
    sampling = Sampling(top_k=4, top_p=0.9, min_p=0.1)
    assert torch.equal(filtered(rows, sampling), torch.stack([filtered(row, sampling) for row in rows]))


def test_temperature_zero_leaves_only_the_likeliest_whatever_the_filters():
    scores = torch.tensor([0.1, 3.0, 2.9])
    assert filtered(scores, Sampling(temperature=0, top_k=2, top_p=0.5)).softmax(-1).tolist() == [0.0, 1.0, 0.0]


def test_greedy_text_is_the_argmax_of_reading_everything_anew_at_each_step(dataset):
    """Also beyond the context, where each token sees the last ``context_length``."""
    model, tokenizer = restless_model(400), dataset.tokenizer
    prompt, context = tokenizer.encode("The old miller found"), 12
    tokens = [tokenizer.end_of_text_id, *prompt]
    for token in continue_tokens(model, tokenizer, prompt, GREEDY, context):
        lo, hi = masks.sliding_window(*masks.causal(1, len(tokens)), context)
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], lo, hi)
        logits = model.logits(hidden)[0, -1]
        logits[[tokenizer.padding_id, tokenizer.mask_id]] = -math.inf
        assert token == int(logits.argmax())
        tokens.append(token)
    assert len(tokens) > 3 * context


def test_the_same_seed_writes_the_same_text_and_another_seed_another(model, trained):
    def write(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed, max_new_tokens=30)
        return "".join(continue_text(model, trained.tokenizer, "The captain", sampling, 32))

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(4)}) == 4


def test_a_sharp_filter_makes_sampling_greedy(model, trained):
    def tokens(**changes) -> list[int]:
        sampling = Sampling(**({"max_new_tokens": 20} | changes))
        return list(continue_tokens(model, trained.tokenizer, [20, 30], sampling, 32))

    assert tokens(temperature=0) == tokens(top_k=1) == tokens(top_p=1e-9) == tokens(min_p=1.0)


def test_the_mask_and_the_padding_are_never_written(dataset):
    model, tokenizer = restless_model(400), dataset.tokenizer
    with torch.no_grad():  # make both the clear favourites
        model.norm.weight.fill_(0.1)
        model.head.weight[[tokenizer.padding_id, tokenizer.mask_id]] = model.head.weight.abs().max() * 50
    written = list(continue_tokens(model, tokenizer, [10], Sampling(max_new_tokens=60, temperature=1.0), 32))
    assert len(written) > 10
    assert not {tokenizer.padding_id, tokenizer.mask_id} & set(written)


def test_writing_stops_at_the_end_of_text_and_at_the_largest_number_of_tokens(dataset):
    model, tokenizer = restless_model(400), dataset.tokenizer
    assert len(list(continue_tokens(model, tokenizer, [], Sampling(max_new_tokens=7, seed=1), 32))) == 7
    with torch.no_grad():  # equal scores: the first of the likeliest is the end of text
        model.head.weight.zero_()
    assert list(continue_tokens(model, tokenizer, [5], GREEDY, 32)) == []


def test_a_trained_model_writes_words_of_its_text(model, trained):
    text = "".join(continue_text(model, trained.tokenizer, "The old", Sampling(temperature=0.5), 32))
    assert text.startswith(" miller ")


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(byte_tokenizer, text):
    pieces = list(stream_text(byte_tokenizer, iter(byte_tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert len(pieces) == len(text)  # one token is a byte, so each piece is one character


def test_an_emoji_arrives_in_one_piece(byte_tokenizer):
    assert list(stream_text(byte_tokenizer, iter(byte_tokenizer.encode("a🎉é")))) == ["a", "🎉", "é"]


def test_special_tokens_have_no_text(byte_tokenizer):
    ids = [byte_tokenizer.end_of_text_id, *byte_tokenizer.encode("a"), byte_tokenizer.mask_id]
    assert list(stream_text(byte_tokenizer, iter(ids))) == ["a"]


def test_a_character_that_was_never_finished_is_shown_as_unreadable(byte_tokenizer):
    tokens = byte_tokenizer.encode("ok 🎉")[:-1]
    assert "".join(stream_text(byte_tokenizer, iter(tokens))) == "ok \ufffd"


@pytest.mark.parametrize("readout", ["masked_token", "masked_next_token"])
def test_masks_are_filled_surest_first_each_seeing_those_filled_before(dataset, readout):
    model, tokenizer = restless_model(400), dataset.tokenizer
    text = "The [MASK] found a silver [MASK] behind the [MASK]."
    tokens = [tokenizer.end_of_text_id]
    for number, part in enumerate(["The", " found a silver", " behind the", "."]):
        tokens += [*([tokenizer.mask_id] if number else []), *tokenizer.encode(part)]
    places = [i for i, token in enumerate(tokens) if token == tokenizer.mask_id]
    top: dict[int, list[tuple[str, float]]] = {}
    for _ in places:
        lo, hi = masks.bidirectional(1, len(tokens))
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], lo, hi))[0]
        logits[:, [tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id]] = -math.inf
        chances = logits.softmax(-1)
        shift = readout == "masked_next_token"
        still = [place for place in places if tokens[place] == tokenizer.mask_id]
        surest = max(still, key=lambda place: float(chances[place - shift].max()))
        best = chances[surest - shift].topk(5)
        tokens[surest] = int(best.indices[0])
        top[surest] = [
            (tokenizer.decode([token]), chance)
            for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    filled = fill_masks(model, tokenizer, text, readout, 64)
    assert filled.text == tokenizer.decode(tokens[1:])
    assert tokenizer.mask_id not in tokens
    for got, wanted in zip(filled.candidates, (top[place] for place in places), strict=True):
        assert [token for token, _ in got] == [token for token, _ in wanted]
        assert [chance for _, chance in got] == pytest.approx([chance for _, chance in wanted], rel=1e-4)


def test_a_trained_model_fills_a_word_of_its_text(model, trained):
    filled = fill_masks(model, trained.tokenizer, "The old [MASK] found a silver key.", "masked_next_token", 32)
    assert filled.text.startswith("The old ")
    assert filled.text.endswith(" found a silver key.")
    assert len(filled.candidates) == 1
    assert len(filled.candidates[0]) == 5
    chances = [chance for _, chance in filled.candidates[0]]
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 1 + 1e-6


def test_text_around_masks_is_kept_whatever_the_tokenizer(byte_tokenizer):
    model = restless_model(byte_tokenizer.vocab_size)
    filled = fill_masks(model, byte_tokenizer, "[MASK]b [MASK] d[MASK]", "masked_token", 32, top=3)
    assert len(filled.candidates) == 3
    pieces = [candidates[0][0] for candidates in filled.candidates]
    if not any("\ufffd" in piece for piece in pieces):
        assert filled.text == f"{pieces[0]}b {pieces[1]} d{pieces[2]}"


def test_nothing_to_fill_is_an_error(model, trained):
    with pytest.raises(UserError, match=r"nothing to fill: write \[MASK\]"):
        fill_masks(model, trained.tokenizer, "no mask here", "masked_next_token", 32)


def test_a_text_beyond_the_context_cannot_be_filled(model, trained):
    with pytest.raises(UserError, match="reads at most 32 at once"):
        fill_masks(model, trained.tokenizer, "[MASK] and so on" * 20, "masked_next_token", 32)


def test_every_impossible_sampling_setting_is_told():
    wrong = Sampling(temperature=-1, top_k=-2, top_p=0, min_p=2, max_new_tokens=0)
    told = wrong.problems()
    assert [sentence.split()[0] for sentence in told] == [
        "--temperature", "--top-k", "--top-p", "--min-p", "--max-new-tokens"
    ]  # fmt: skip
    assert Sampling(temperature=math.nan).problems()
    assert Sampling().problems() == []


def test_unreadable_bytes_do_not_swallow_the_character_after_them():
    tokenizer = train_tokenizer(iter([]), TokenizerSettings("bytes"))
    of_byte = {tokenizer.decode_bytes([i]): i for i in range(3, tokenizer.vocab_size)}
    for content in (b"\xf0\x9f" + "😀".encode(), b"a\xc3" + "é".encode() + b"\xff", b"\xe2\x82b"):
        tokens = [of_byte[bytes([byte])] for byte in content]
        assert "".join(stream_text(tokenizer, iter(tokens))) == content.decode("utf-8", "replace")


def test_only_tokens_that_the_tokenizer_has_are_written(small, quietly, tmp_path):
    run = quietly(small.replace(vocab_size=1000, steps=1), tmp_path / "run")
    model = run.load_model(torch.device("cpu"))
    "".join(continue_text(model, run.tokenizer, "The", Sampling(temperature=1.0, max_new_tokens=60), 32))
    for token, _ in fill_masks(model, run.tokenizer, "The [MASK]", "masked_next_token", 32, top=50).candidates[0]:
        assert token


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, float("inf")])
def test_any_temperature_samples_or_is_told(trained, temperature):
    sampling = Sampling(temperature=temperature, max_new_tokens=3)
    if not sampling.problems():
        model = trained.load_model(torch.device("cpu"))
        "".join(continue_text(model, trained.tokenizer, "The", sampling, 32))


def test_a_seed_out_of_range_is_told():
    assert Sampling(seed=2**70).problems()
