from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.inference.generator import Generator, stream
from lm.inference.kv_cache import ReadingPrompt
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.kernels import masks
from lm.model.transformer import Transformer
from tests.conftest import loaded

GREEDY = Sampling(temperature=0, max_new_tokens=40)


def written(*arguments) -> list[int]:
    return [event.token for event in stream(*arguments) if event.token is not None]


def text_of(events) -> str:
    return "".join(event.text for event in events)


def restless_model(tokenizer: Tokenizer, context_length: int = 32, **settings: Any) -> LanguageModel:
    """An untrained model whose choices depend on all it reads."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": tokenizer.vocab_size}
    settings = shape | {"tie_embeddings": False, "context_length": context_length} | settings
    config = Config().replace(**settings)
    model = Transformer(config.model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return LanguageModel(model, tokenizer, config)


def test_greedy_text_is_the_argmax_of_rereading_everything_at_each_step(dataset):
    """Also beyond the context, where each token sees the last ``context_length``."""
    tokenizer, context = dataset.tokenizer, 12
    model, prompt = restless_model(tokenizer, context), tokenizer.encode("The old miller found")
    tokens = [tokenizer.end_of_text_id, *prompt]
    for token in written(model, prompt, GREEDY):
        lo, hi = masks.sliding_window(*masks.causal(1, len(tokens)), context)
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokens]), torch.arange(len(tokens))[None], lo, hi)
        logits = model.model.logits(hidden)[0, -1]
        logits[[tokenizer.padding_id, tokenizer.mask_id]] = -math.inf
        assert token == int(logits.argmax())
        tokens.append(token)
    assert len(tokens) > 3 * context


def test_the_same_seed_writes_the_same_text_and_another_seed_another(dataset):
    model = restless_model(dataset.tokenizer)

    def write(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed, max_new_tokens=30)
        return text_of(stream(model, "The captain", sampling))

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(4)}) == 4


def test_a_sharp_filter_makes_sampling_greedy(dataset):
    model = restless_model(dataset.tokenizer)

    def tokens(**changes) -> list[int]:
        sampling = Sampling(**({"max_new_tokens": 20} | changes))
        return written(model, [20, 30], sampling)

    assert tokens(temperature=0) == tokens(top_k=1) == tokens(top_p=1e-9) == tokens(min_p=1.0)


def test_the_mask_and_the_padding_are_never_written(dataset):
    model, tokenizer = restless_model(dataset.tokenizer), dataset.tokenizer
    with torch.no_grad():  # make both the clear favourites
        model.model.norm.weight.fill_(0.1)
        model.model.head.weight[[tokenizer.padding_id, tokenizer.mask_id]] = model.model.head.weight.abs().max() * 50
    tokens = written(model, [10], Sampling(max_new_tokens=60, temperature=1.0))
    assert len(tokens) > 10
    assert not {tokenizer.padding_id, tokenizer.mask_id} & set(tokens)


def test_writing_stops_at_the_end_of_text_and_at_the_largest_number_of_tokens(dataset):
    model = restless_model(dataset.tokenizer)
    assert len(written(model, [], Sampling(max_new_tokens=7, seed=1))) == 7
    with torch.no_grad():  # equal scores: the first of the likeliest is the end of text
        model.model.head.weight.zero_()
    assert written(model, [5], GREEDY) == []


def test_a_trained_model_writes_words_of_its_text(trained):
    text = text_of(stream(loaded(trained), "The old", Sampling(temperature=0.5)))
    assert text.startswith(" miller ")


def test_only_tokens_that_the_tokenizer_has_are_written(dataset):
    model = restless_model(dataset.tokenizer, vocab_size=1000)
    tokens = written(model, "The", Sampling(temperature=1.0, max_new_tokens=60))
    assert len(tokens) > 10
    assert max(tokens) < dataset.tokenizer.vocab_size


@pytest.mark.parametrize("temperature", [1e-40, 1e-5, 0.009, 0.01, 100.0])
def test_the_extreme_temperatures_that_are_allowed_still_sample(dataset, temperature):
    """A tiny temperature is greedy, a huge one as good as uniform; neither overflows."""
    sampling = Sampling(temperature=temperature, max_new_tokens=30)
    tokens = written(restless_model(dataset.tokenizer), "The", sampling)
    greedy = written(restless_model(dataset.tokenizer), "The", dataclasses.replace(sampling, temperature=0))
    assert (tokens == greedy) == (temperature < 1)


@pytest.mark.parametrize("temperature", [-1e-5, 101.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(dataset, temperature):
    with pytest.raises(UserError, match="temperature must be from 0 to 100"):
        next(stream(restless_model(dataset.tokenizer), "The", Sampling(temperature=temperature)))


def all_texts(generator: Generator) -> dict[int, str]:
    """Every request's text, once all are written."""
    texts: dict[int, str] = {}
    while generator.busy:
        for event in generator.step():
            texts[event.handle] = texts.get(event.handle, "") + event.text
    return texts


def test_a_request_gets_the_same_text_alone_and_in_any_company(dataset):
    """Requests of all lengths and settings, more than there are rows, some of which come late."""
    model = restless_model(dataset.tokenizer, 24)
    words = [
        "The",
        "old",
        "miller",
        "found",
        "a",
        "silver",
        "key",
        "behind",
        "the",
        "barn",
        "and",
        "lost",
        "it",
        "again",
    ]
    requests = [
        (
            " ".join(words[: n % 13]),
            Sampling((0.0, 0.9, 1.3)[n % 3], top_p=(1.0, 0.9)[n % 2], seed=n, max_new_tokens=5 + n * 7 % 40),
        )
        for n in range(24)
    ]
    alone = [text_of(stream(model, prompt, sampling)) for prompt, sampling in requests]
    for rows in (1, 3, 16):
        generator = Generator(model, max_rows=rows)
        handles = [generator.add(*request) for request in requests[:5]]
        texts = {}
        for request in requests[5:]:
            for event in generator.step():
                texts[event.handle] = texts.get(event.handle, "") + event.text
            handles.append(generator.add(*request))
        for handle, text in all_texts(generator).items():
            texts[handle] = texts.get(handle, "") + text
        assert [texts[handle] for handle in handles] == alone


def test_events_have_tokens_text_reason_and_log_probabilities(dataset):
    model, tokenizer = restless_model(dataset.tokenizer, 64), dataset.tokenizer
    sampling = Sampling(temperature=0.7, top_k=3, max_new_tokens=9, logprobs=2, seed=3)
    events = list(stream(model, "The old", sampling))
    tokens = [tokenizer.end_of_text_id, *tokenizer.encode("The old")]
    assert [event.finish_reason for event in events] == [None] * 8 + ["length"]
    for event in events:
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokens]), torch.arange(len(tokens))[None], *masks.causal(1, len(tokens)))
            logits = model.model.logits(hidden)[0, -1]
        logits[[tokenizer.padding_id, tokenizer.mask_id]] = -math.inf
        log_p = logits.log_softmax(-1)
        assert event.logprob == pytest.approx(float(log_p[event.token]), abs=1e-4)
        best = log_p.topk(2)
        assert [token for token, _ in event.top_logprobs] == best.indices.tolist()
        assert [value for _, value in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        tokens.append(event.token)
    assert text_of(events) == tokenizer.decode(tokens[-9:])


def test_a_stop_string_ends_the_text_before_it(dataset):
    model = restless_model(dataset.tokenizer, 64)
    sampling = Sampling(max_new_tokens=60, seed=5)
    whole = text_of(stream(model, "The", sampling))
    stop = whole[20:23]
    events = list(stream(model, "The", dataclasses.replace(sampling, stop=(stop,))))
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert events[-1].token is not None
    assert len(events) < 60


def test_a_cancelled_request_leaves_the_others_as_they_were(dataset):
    model = restless_model(dataset.tokenizer)
    sampling = Sampling(max_new_tokens=20, temperature=1.0)
    generator = Generator(model, max_rows=3)
    handles = [generator.add(prompt, sampling) for prompt in ("The", "A horse", "Nobody", "Again", "An owl")]
    texts = {event.handle: event.text for event in generator.step()}
    for handle in (handles[0], handles[4], 99):  # live, waiting, unknown
        generator.cancel(handle)
    for handle, text in all_texts(generator).items():
        texts[handle] = texts.get(handle, "") + text
    for handle, prompt in zip(handles[1:4], ("A horse", "Nobody", "Again"), strict=True):
        assert texts[handle] == text_of(stream(model, prompt, sampling))
    assert handles[4] not in texts


def test_penalties_count_what_was_read_and_written(dataset):
    """A strong presence penalty writes no token twice; a repetition penalty none of the prompt either."""
    model, tokenizer = restless_model(dataset.tokenizer, 64), dataset.tokenizer
    prompt = tokenizer.encode("The old miller found a silver key")
    once = written(model, prompt, Sampling(temperature=0, presence_penalty=100, max_new_tokens=30))
    assert len(set(once)) == len(once) == 30
    fresh = written(model, prompt, Sampling(temperature=0, repetition_penalty=100, max_new_tokens=30))
    assert len({*fresh}) == 30
    assert not {*fresh} & {*prompt}


def test_all_invalid_settings_are_reported_at_once(dataset):
    generator = Generator(restless_model(dataset.tokenizer))
    with pytest.raises(UserError, match=r"(?s)top_p must be .*temperature|temperature must be .*top_p") as error:
        generator.add([5, 400], Sampling(temperature=-1, top_p=2))
    assert "the prompt holds token 400, but the model has 400" in str(error.value)
    assert not generator.busy
    assert generator.step() == []


@pytest.mark.parametrize("context", [64, 10])
def test_a_conversation_reads_only_what_is_new(dataset, context, monkeypatch):
    model, tokenizer = restless_model(dataset.tokenizer, context), dataset.tokenizer
    generator = Generator(model, max_rows=1, reuse=True)
    read = []
    monkeypatch.setattr(
        "lm.inference.generator.ReadingPrompt",
        lambda cache, row, count: read.append(count) or ReadingPrompt(cache, row, count),
    )
    text: list[int] = []
    for turn in ("The old miller", " found a key.", " Again and again"):
        text += tokenizer.encode(turn)
        generator.add(text, GREEDY)
        made = []
        while generator.busy:
            made += [event.token for event in generator.step() if event.token is not None]
        assert made == written(model, text, GREEDY)
        text += made
    assert sum(read[i] for i in (0, 2, 4)) < 40 < len(text)
