from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.serve.schema import ApiError, Limits, choice_sampling, encode_prompt, parse_json, read_chat, read_completion

LIMITS = Limits(new_tokens=500)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def refused(read, body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, LIMITS)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_openais():
    asked = read_completion({"prompt": "a"}, LIMITS)
    assert (asked.prompts, asked.max_tokens, asked.echo) == (["a"], 16, False)
    options, sampling = asked.options, asked.options.sampling
    assert (options.model, options.choices, options.stream, options.include_usage) == (None, 1, False, False)
    assert sampling == Sampling(temperature=1.0, max_new_tokens=16, seed=sampling.seed)
    assert read_completion({"prompt": "a"}, LIMITS).options.sampling.seed != sampling.seed
    assert read_chat(HELLO, LIMITS).max_tokens is None
    defaults = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.25)
    found = read_chat(HELLO, LIMITS, defaults).options.sampling
    assert (found.filters, found.presence_penalty, found.frequency_penalty) == (defaults.filters, 0.5, 0.25)


def test_every_field_is_read():
    body = {
        "prompt": ["a", "b"],
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.25,
        "typical_p": 0.75,
        "repetition_penalty": 2,
        "presence_penalty": 1.5,
        "frequency_penalty": -1,
        "stop": "x",
        "seed": 5,
        "logprobs": 3,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "echo": True,
        "model": "m",
    }
    asked = read_completion(body, LIMITS)
    assert asked.options.sampling == Sampling(0.0, 4, 0.5, 0.25, 0.75, 2.0, 1.5, -1.0, 7, ("x",), 5, 3)
    assert (asked.options.choices, asked.options.stream, asked.options.include_usage) == (2, True, True)
    assert (asked.prompts, asked.echo, asked.options.model) == (["a", "b"], True, "m")


def test_null_counts_as_not_given():
    names = ("max_tokens", "temperature", "stop", "logprobs", "n", "stream", "stream_options", "suffix", "model")
    asked = read_completion({"prompt": "a", "seed": 1} | dict.fromkeys(names), LIMITS)
    assert asked == read_completion({"prompt": "a", "seed": 1}, LIMITS)


def test_chat_reads_parts_and_old_and_new_names():
    message = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    asked = read_chat({"messages": [message], "max_completion_tokens": 5, "logprobs": True}, LIMITS)
    assert asked.messages == [{"role": "system", "content": "ab"}]
    assert asked.max_tokens == 5
    assert asked.options.sampling.logprobs == 0
    assert read_chat(HELLO | {"max_tokens": 6}, LIMITS).max_tokens == 6
    assert read_chat(HELLO | {"max_tokens": 6, "max_completion_tokens": 6}, LIMITS).max_tokens == 6
    for values in ({"max_tokens": 6, "max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 6}):
        error = refused(read_chat, HELLO | values)
        assert error.message == '"max_tokens" and "max_completion_tokens" differ: give one of the two'
    assert "from 1 to" in refused(read_chat, HELLO | {"max_tokens": 0, "max_completion_tokens": 5}).message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "must be a string, a list of strings"),
        ({"prompt": []}, "must be a string, a list of strings"),
        ({"prompt": [1, "a"]}, "must be a string, a list of strings"),
        ({"prompt": [[1], []]}, "must be a string, a list of strings"),
        ({"prompt": [True]}, "must be a string, a list of strings"),
        ({"max_tokens": 0}, "from 1 to 500, not 0"),
        ({"max_tokens": 501}, "from 1 to 500, not 501"),
        ({"max_tokens": True}, "whole number"),
        ({"max_tokens": 1.5}, "whole number"),
        ({"temperature": "warm"}, 'a number from 0 to 100, not "warm"'),
        ({"temperature": -0.001}, "must be a number from 0 to 100"),
        ({"top_p": 0}, "must be above 0"),
        ({"presence_penalty": 3}, "from -2 to 2"),
        ({"n": 0}, "from 1 to"),
        ({"stream": 1}, "must be true or false"),
        ({"stop": ["a", ""]}, "none empty"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"seed": 2**63}, "whole number"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"model": 3}, "must be a string"),
        ({"stream_options": 3}, "must be an object"),
        ({"stream_options": {"include_usag": True}}, '"stream_options.include_usag" is unknown: did you mean'),
        ({"max_tokns": 5}, 'did you mean "max_tokens"'),
        ({"logit_bias": {"5": 1}}, "not supported"),
        ({"best_of": 2}, "not supported"),
    ],
)
def test_invalid_fields_are_named(change, words):
    error = refused(read_completion, {"prompt": "a"} | change)
    assert words in error.message
    assert error.param == next(iter(change)) or error.param.startswith("stream_options.")
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, '"messages" must be a list'),
        ({"messages": []}, "at least one"),
        ({"messages": ["a"]}, '"messages[0]" must be an object'),
        ({"messages": [{"role": "tool", "content": "a"}]}, '"messages[0].role" must be system, user or assistant'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            '"messages[0].content" must be a string',
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, '"messages[0].content" must be a string'),
        (HELLO | {"top_logprobs": 2}, 'needs "logprobs"'),
        (HELLO | {"logprobs": 2}, "true or false"),
        (HELLO | {"tools": [{}]}, "not supported"),
    ],
)
def test_invalid_fields_of_a_chat_are_named(body, words):
    assert words in refused(read_chat, body).message


def test_all_mistakes_are_reported_at_once():
    error = refused(read_completion, {"prompt": 1, "n": "x", "stream": "yes", "what": 1})
    assert all(f'"{name}"' in error.message for name in ("prompt", "n", "stream", "what"))


def test_unsupported_fields_that_request_nothing_are_accepted():
    nothing = {"user": "me", "best_of": 1, "logit_bias": {}, "suffix": ""}
    assert read_completion({"prompt": "a", "seed": 1} | nothing, LIMITS) == read_completion(
        {"prompt": "a", "seed": 1}, LIMITS
    )
    assert read_chat(HELLO | {"response_format": {"type": "text"}, "tools": [], "metadata": {"a": "b"}}, LIMITS)


def test_choices_have_different_seeds_and_the_first_the_requested_one():
    sampling = Sampling(seed=2**63 - 1)
    assert [choice_sampling(sampling, number).seed for number in range(3)] == [2**63 - 1, 0, 1]
    assert read_completion({"prompt": "a", "seed": -1}, LIMITS).options.sampling.seed == 2**63 - 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"a"',
        b"nul",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_not_a_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    json.dumps(caught.value.body()).encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["prompt", "messages", "max_tokens", "temperature", "stop", "n", "seed", "stream", "tools"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES | st.just("user"), "content": VALUES}), max_size=2)


@given(
    body=st.dictionaries(NAMES | st.text(max_size=8), VALUES, max_size=6),
    messages=MESSAGES,
    options=VALUES,
)
def test_any_json_is_parsed_or_refused(body, messages, options):
    for read, more in ((read_completion, {}), (read_chat, {"messages": messages, "stream_options": options})):
        try:
            read({**body, **more}, LIMITS)
        except ApiError as error:
            assert error.status == 400
            json.dumps(error.body(), ensure_ascii=False).encode()


def test_prompts_longer_than_the_context_and_unknown_ids_are_refused(trained):
    tokenizer, model = trained.tokenizer, LanguageModel(None, trained.tokenizer, trained.config)
    assert list(encode_prompt("The captain", model, "prompt")) == tokenizer.encode("The captain")
    assert encode_prompt([1] * 31, model, "prompt") == [1] * 31
    with pytest.raises(ApiError, match="has 32 tokens; this model reads at most 31") as caught:
        encode_prompt([1] * 32, model, "prompt")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ApiError, match="has more than 32 tokens; this model reads at most 31") as caught:
        encode_prompt("The captain " * 1000, model, "prompt")
    assert caught.value.code == "context_length_exceeded"
    for invalid in (-1, tokenizer.vocab_size):
        with pytest.raises(ApiError, match=f"token id {invalid}"):
            encode_prompt([1, invalid], model, "prompt")
