from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer
from lm.inference.fill_mask import fill_masks, tokens_to_fill
from lm.inference.sampling import Sampling
from lm.kernels import masks
from tests.conftest import loaded
from tests.lm.inference.test_generator import restless_model


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return train_tokenizer(iter([]), TokenizerSettings("bytes"))


@pytest.mark.parametrize("readout", ["masked_token", "masked_next_token"])
def test_the_most_certain_mask_is_filled_first_and_seen_by_the_others(dataset, readout):
    tokenizer = dataset.tokenizer
    language_model = restless_model(tokenizer, 64, objective=readout)
    model = language_model.model
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
    filled = fill_masks(language_model, text)
    assert filled.text == tokenizer.decode(tokens[1:])
    assert tokenizer.mask_id not in tokens
    for got, wanted in zip(filled.candidates, (top[place] for place in places), strict=True):
        assert [token for token, _ in got] == [token for token, _ in wanted]
        assert [chance for _, chance in got] == pytest.approx([chance for _, chance in wanted], rel=1e-4)


def test_a_trained_model_fills_a_word_of_its_text(trained):
    filled = fill_masks(loaded(trained), "The old [MASK] found a silver key.")
    assert filled.text.startswith("The old ")
    assert filled.text.endswith(" found a silver key.")
    assert len(filled.candidates) == 1
    assert len(filled.candidates[0]) == 5
    chances = [chance for _, chance in filled.candidates[0]]
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 1 + 1e-6


def test_text_around_masks_is_kept_whatever_the_tokenizer(byte_tokenizer):
    model = restless_model(byte_tokenizer, objective="masked_token")
    filled = fill_masks(model, "[MASK]b [MASK] d[MASK]", top=3)
    assert len(filled.candidates) == 3
    pieces = [candidates[0][0] for candidates in filled.candidates]
    if not any("\ufffd" in piece for piece in pieces):
        assert filled.text == f"{pieces[0]}b {pieces[1]} d{pieces[2]}"


def test_a_mask_takes_the_space_before_it_in_every_script(dataset):
    hindi = train_tokenizer(iter(["किताब मेज पर है", "मेज पर किताब है"] * 20), TokenizerSettings(vocab_size=280))
    assert len(hindi.encode(" a")) == 2
    assert len(hindi.encode(" पर")) == 1
    for tokenizer, text in ((hindi, "किताब [MASK] है"), (dataset.tokenizer, "The [MASK] found")):
        before, after = map(tokenizer.encode, text.split(" [MASK]"))
        tokens = tokens_to_fill(tokenizer, restless_model(tokenizer).config, text)
        assert tokens == [tokenizer.start_id, *before, tokenizer.mask_id, *after]


def test_a_text_that_cannot_be_filled_is_an_error(dataset):
    model = restless_model(dataset.tokenizer)
    with pytest.raises(UserError, match=r"nothing to fill in .*: write \[MASK\]"):
        fill_masks(model, "no mask here")
    with pytest.raises(UserError, match="reads at most 32 at once"):
        fill_masks(model, "[MASK] and so on" * 20)
    with pytest.raises(UserError, match="not trained to fill masks"):
        fill_masks(restless_model(dataset.tokenizer, objective="next_token"), "The [MASK]")


def test_a_number_stands_for_as_many_masks(dataset):
    model = restless_model(dataset.tokenizer)
    spelled = fill_masks(model, "The old [MASK][MASK][MASK] found")
    assert fill_masks(model, "The old [MASK:3] found") == spelled
    assert len(spelled.candidates) == 3
    for text in ("The [MASK:0]", "The [MASK:]", "The [MASK:x]"):
        with pytest.raises(UserError, match="nothing to fill"):
            fill_masks(model, text)


def test_without_a_number_of_rounds_each_mask_has_its_own(dataset):
    model = restless_model(dataset.tokenizer, 64, objective="masked_token")
    text = "The [MASK:4] found [MASK] behind [MASK:2]"
    assert fill_masks(model, text, rounds=99) == fill_masks(model, text)


def test_one_round_fills_each_mask_as_first_predicted(dataset):
    tokenizer = dataset.tokenizer
    language_model = restless_model(tokenizer, 64, objective="masked_token")
    model = language_model.model
    tokens = [tokenizer.end_of_text_id, *tokenizer.encode("The"), *[tokenizer.mask_id] * 6]
    with torch.no_grad():
        bounds = masks.bidirectional(1, len(tokens))
        logits = model.logits(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], *bounds))[0, -6:]
    logits[:, [tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id]] = -math.inf
    once = fill_masks(language_model, "The [MASK:6]", rounds=1, top=1)
    assert [each[0][0] for each in once.candidates] == [tokenizer.decode([int(i)]) for i in logits.argmax(-1)]


def test_sampled_texts_follow_their_seed_and_keep_what_was_there(dataset):
    model = restless_model(dataset.tokenizer)

    def written(seed: int, rounds: int = 4, temperature: float = 1.5) -> str:
        sampling = Sampling(temperature=temperature, seed=seed)
        return fill_masks(model, "The old miller [MASK:12] under a wide sky.", rounds=rounds, sampling=sampling).text

    texts = [written(seed) for seed in range(4)]
    assert texts == [written(seed) for seed in range(4)]
    assert len(set(texts)) == 4
    assert all(text.startswith("The old miller") and text.endswith(" under a wide sky.") for text in texts)
    assert len({written(seed, temperature=0) for seed in range(4)}) == 1


def test_a_random_order_draws_from_the_mean_over_all_orders(byte_tokenizer):
    """Two masks, and for each the two tokens that are likeliest at the time: four texts, with known probabilities."""
    language_model = restless_model(byte_tokenizer, 64, objective="diffusion")
    model, sampling = language_model.model, Sampling(top_k=2, temperature=1)
    a, b, c = (byte_tokenizer.encode(letter) for letter in "abc")
    start = [byte_tokenizer.end_of_text_id, *a, byte_tokenizer.mask_id, *b, byte_tokenizer.mask_id, *c]
    places = [i for i, token in enumerate(start) if token == byte_tokenizer.mask_id]

    def chances(tokens: list[int], place: int) -> dict[int, float]:
        lo, hi = masks.bidirectional(1, len(tokens))
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], lo, hi))[0, place - 1]
        logits[[byte_tokenizer.end_of_text_id, byte_tokenizer.padding_id, byte_tokenizer.mask_id]] = -math.inf
        logits[byte_tokenizer.vocab_size :] = -math.inf
        best = logits.double().topk(2)
        return dict(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))

    expected: dict[str, float] = {}
    for first, second in (places, places[::-1]):
        for token, chance in chances(start, first).items():
            after = [token if i == first else t for i, t in enumerate(start)]
            for other, its in chances(after, second).items():
                text = byte_tokenizer.decode([other if i == second else t for i, t in enumerate(after)][1:])
                expected[text] = expected.get(text, 0.0) + chance * its / 2
    count, found = 300, dict.fromkeys(expected, 0)
    for seed in range(count):
        filled = fill_masks(language_model, "a[MASK]b[MASK]c", order="random", sampling=replace(sampling, seed=seed))
        found[filled.text] += 1
    assert len(expected) >= 4
    for text, chance in expected.items():
        assert abs(found[text] - count * chance) <= 4 * math.sqrt(count * chance * (1 - chance)) + 1
