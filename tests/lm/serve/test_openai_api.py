"""OpenAI's client, and plain HTTP, against a running server."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import shutil
import socket
import time
from functools import partial

import openai
import pytest

from lm.inference import chat_template
from lm.inference.chat_template import PLAIN_STOPS, render
from lm.inference.generator import stream
from lm.inference.sampling import Sampling
from lm.inference.scoring import log_likelihoods
from lm.runs.directory import open_run
from lm.serve.engine import _Job
from lm.serve.schema import Limits

GREEDY = {"temperature": 0.0, "max_tokens": 12}
ENDLESS = {"temperature": 0, "repetition_penalty": 0.5}  # repeats itself endlessly
HELLO = [{"role": "user", "content": "the old miller"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(service, prompt: str, **settings) -> str:
    """What the generator writes when nobody else is there."""
    events = stream(service.model, prompt, Sampling(**settings))
    return "".join(event.text for event in events)


def test_a_completion_is_the_text_of_the_generator(client, served):
    answer = client.completions.create(model="trained", prompt="the captain", **GREEDY)
    assert answer.object == "text_completion"
    assert answer.model == "trained"
    assert answer.choices[0].text == alone(served.service, "the captain", temperature=0.0, max_new_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    prompt = len(served.service.model.tokenizer.encode("the captain"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12


def test_every_setting_reaches_the_generator(client, served):
    own = {"top_k": 20, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2}
    shared = {"temperature": 1.5, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 11}
    answer = client.completions.create(model="trained", prompt="nobody", max_tokens=20, **shared, extra_body=own)
    assert answer.choices[0].text == alone(served.service, "nobody", max_new_tokens=20, **shared, **own)


def test_a_stream_adds_up_to_the_whole(client):
    asked = {"model": "trained", "prompt": ["the captain", "a young"], "n": 2, "seed": 3, "max_tokens": 15}
    whole = client.completions.create(**asked)
    texts, reasons = [""] * 4, [None] * 4
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(set(texts)) == 4


def test_token_ids_are_as_good_as_text(client, served):
    ids = served.service.model.tokenizer.encode("the captain")
    by_ids = client.completions.create(model="trained", prompt=[ids, ids], **GREEDY)
    by_text = client.completions.create(model="trained", prompt="the captain", **GREEDY)
    assert [choice.text for choice in by_ids.choices] == [by_text.choices[0].text] * 2


def test_a_stop_string_ends_the_text_and_is_not_in_it(client):
    text = client.completions.create(model="trained", prompt="the captain", **GREEDY).choices[0].text
    stop = text[5:8]
    choice = client.completions.create(model="trained", prompt="the captain", stop=stop, **GREEDY).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_with_log_probabilities_scores_the_prompt(client, served, streamed):
    prompt, service = "the captain lost seven apples", served.service
    asked = {"model": "trained", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}
    if streamed:
        (choice,) = next(iter(client.completions.create(**asked, stream=True))).choices
    else:
        (choice,) = client.completions.create(**asked).choices
    ids = service.model.tokenizer.encode(prompt)
    assert choice.text == prompt == "".join(choice.logprobs.tokens)
    assert choice.finish_reason == "length"
    (score,) = log_likelihoods(service.model, [ids], "next_token")
    assert sum(choice.logprobs.token_logprobs) == pytest.approx(score, abs=1e-4)
    assert choice.logprobs.text_offset[0] == 0
    assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)


def test_echo_goes_on_with_what_is_written(client):
    asked = {"model": "trained", "prompt": "the captain", **GREEDY}
    text = client.completions.create(**asked).choices[0].text
    echoed = client.completions.create(**asked, echo=True, logprobs=0).choices[0]
    assert echoed.text == "the captain" + text
    offsets = echoed.logprobs.text_offset
    assert [echoed.text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == echoed.logprobs.tokens


def test_log_probabilities_of_what_is_written_are_the_models(client):
    choice = client.completions.create(model="trained", prompt="the captain", logprobs=3, **GREEDY).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())  # greedy decoding takes the most likely token
    assert logprobs.text_offset[0] == len("the captain")


def test_a_chat_is_the_continuation_of_its_rendering(client, served):
    answer = client.chat.completions.create(model="trained", messages=HELLO, **GREEDY)
    text = alone(served.service, render(HELLO, None), temperature=0.0, max_new_tokens=12, stop=PLAIN_STOPS)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    parts, roles = "", []
    for chunk in client.chat.completions.create(model="trained", messages=HELLO, stream=True, **GREEDY):
        assert chunk.object == "chat.completion.chunk"
        parts += chunk.choices[0].delta.content or ""
        roles += [chunk.choices[0].delta.role] if chunk.choices[0].delta.role else []
    assert (parts, roles) == (text, ["assistant"])


def test_plain_turns_end_where_the_next_one_begins(served, monkeypatch):
    asked = {"messages": HELLO, **GREEDY}
    text = served.ask("/v1/chat/completions", asked).json["choices"][0]["message"]["content"]
    monkeypatch.setattr(chat_template, "PLAIN_STOPS", (text[6:9],))
    choice = served.ask("/v1/chat/completions", asked).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(text[6:9])], "stop")
    choice = served.ask("/v1/chat/completions", {**asked, "stop": text[2:5]}).json["choices"][0]
    assert choice["message"]["content"] == text[: text.index(text[2:5])]


def test_a_chat_without_a_limit_ends_where_the_context_does(client, served):
    answer = client.chat.completions.create(model="trained", messages=HELLO, temperature=0.0, logprobs=True)
    prompt = answer.usage.prompt_tokens
    assert answer.usage.completion_tokens <= served.service.model.context_length - 1 - prompt
    logprobs = answer.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in logprobs).decode().startswith(answer.choices[0].message.content)
    assert all(one.logprob <= 0 for one in logprobs)


def test_a_run_with_its_own_template_uses_it(served, trained, serving, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "own")
    (run / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} and")
    with serving(open_run(run)) as own:
        answer = own.ask("/v1/chat/completions", {"messages": HELLO, **GREEDY}).json
    text = alone(served.service, "the old miller and", temperature=0.0, max_new_tokens=12)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["model"] == "own"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["trained"]
    assert client.models.retrieve("trained").owned_by == "kindling"
    with pytest.raises(openai.NotFoundError, match='no model "gpt"'):
        client.models.retrieve("gpt")


def test_the_client_raises_its_own_exceptions(client):
    def create(**changes):
        return client.completions.create(**{"model": "trained", "prompt": "a", **changes})

    with pytest.raises(openai.NotFoundError) as caught:
        create(model="gpt-5")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="must be a number from 0 to 100") as caught:
        create(temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            create(prompt="word " * 100, stream=streamed)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="texts"):
        create(prompt=["a"] * 261)
    with pytest.raises(openai.BadRequestError, match="reads at most 31 at once"):
        client.chat.completions.create(model="trained", messages=[{"role": "user", "content": "word " * 100}])


def test_the_same_seed_writes_the_same_text_alone_and_among_others(client, served):
    def asked(seed: int) -> dict:
        return {"model": "trained", "prompt": "the captain", "seed": seed, "max_tokens": 25, "temperature": 1.3}

    texts = [client.completions.create(**asked(seed)).choices[0].text for seed in range(4)]
    assert len(set(texts)) == 4

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            answers = await asyncio.gather(*(many.completions.create(**asked(seed)) for seed in range(12)))
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together())[:4] == texts
    assert served.writer.most_at_once > 1


def test_two_hundred_requests_at_once_are_all_answered(trained, serving):
    with serving(trained, limits=Limits(concurrent=16, waiting=200)) as served:

        async def together() -> list:
            url = f"{served.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as many:
                asked = (
                    many.completions.create(model="trained", prompt="the", max_tokens=1 + n % 12, seed=n)
                    for n in range(200)
                )
                return await asyncio.gather(*asked)

        answers = asyncio.run(together())
        assert [answer.usage.completion_tokens <= 1 + n % 12 for n, answer in enumerate(answers)] == [True] * 200
        assert served.writer.most_at_once > 8
        served.settle()


def test_requests_beyond_the_limit_are_refused_with_429(trained, serving):
    with serving(trained, limits=Limits(concurrent=1, waiting=1)) as served:

        async def together() -> list[int]:
            url = f"{served.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as many:
                create = partial(many.completions.create, model="trained", prompt="the", extra_body=ENDLESS)
                asked = (create(max_tokens=500) for _ in range(12))
                answers = await asyncio.gather(*asked, return_exceptions=True)
            return [200 if not isinstance(answer, Exception) else answer.status_code for answer in answers]

        statuses = asyncio.run(together())
        assert set(statuses) == {200, 429}
        assert served.ask("/v1/completions", {"prompt": "the"}).status == 200


def hang_up(served, streamed: bool, texts: int = 1) -> None:
    """Request long texts, wait until they are being generated, and disconnect."""
    data = json.dumps({"prompt": "the", "max_tokens": 2048, "n": texts, "stream": streamed, **ENDLESS}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        got = b""
        while streamed and b"data: " not in got:
            got += connection.recv(1000)
        until = time.monotonic() + 120
        while not streamed and not served.writer.busy:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.mark.parametrize("streamed", [True, False])
def test_the_text_of_a_client_that_disconnects_is_canceled(served, streamed):
    served.settle()
    before = served.writer.cancelled
    hang_up(served, streamed, texts=2)
    until = time.monotonic() + 120
    while served.writer.cancelled < before + 2:
        assert time.monotonic() < until
        time.sleep(0.005)
    served.settle()


def test_misbehaving_clients_leave_nothing_behind(served):
    served.settle()
    for number in range(20):
        hang_up(served, streamed=number % 2 == 0)
        assert served.ask("/v1/completions", b'{"prompt": "the"').status == 400
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    served.settle()
    until = time.monotonic() + 120
    while any(type(thing) is _Job for thing in gc.get_objects()):
        assert time.monotonic() < until
        gc.collect()
    assert served.ask("/health").json == {"status": "ok", "requests": 0, "places": served.service.places}


def test_after_a_failure_of_the_model_the_server_answers_again(served, poison, capfd):
    for streamed in (False, True):
        answer = served.ask("/v1/completions", {"prompt": poison, "stream": streamed})
        assert (answer.status, answer.error["type"]) == (500, "server_error")
        assert "poison" not in answer.error["message"]
    assert "this prompt is poison" in capfd.readouterr().err
    assert served.ask("/v1/completions", {"prompt": "the"}).status == 200


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(trained, serving, monkeypatch, capfd):
    with serving(trained) as served:
        step, steps = type(served.writer).step, []

        def failing(self):
            steps.append(1)
            if len(steps) == 4:
                raise RuntimeError("no more memory")
            return step(self)

        monkeypatch.setattr(type(served.writer), "step", failing)
        answer = served.ask("/v1/completions", {"prompt": "the", "stream": True, "temperature": 0})
        *events, last, empty = answer.body.decode().split("\n\n")
        assert events
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert empty == ""


def test_probabilities_are_probabilities(client):
    logprobs = client.completions.create(model="trained", prompt="the", max_tokens=5, logprobs=20).choices[0].logprobs
    assert all(sum(map(math.exp, top.values())) <= 1.0001 for top in logprobs.top_logprobs)
