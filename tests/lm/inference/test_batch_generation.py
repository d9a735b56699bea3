from __future__ import annotations

import dataclasses
import json

import pytest

from data_prep.errors import UserError
from lm.inference.batch_generation import AHEAD, Prompt, check_prompts, continuations, events_in_order, read_prompts
from lm.inference.chat_template import PLAIN_STOPS, ChatFormat
from lm.inference.generator import Generator
from lm.inference.sampling import Sampling
from tests.lm.inference.test_generator import restless_model, stream, text_of

DEFAULTS = Sampling(max_new_tokens=6, temperature=1.0)
PLAIN = ChatFormat(None, None)


def prompts_of(count: int) -> list[Prompt]:
    """Texts of very different lengths, the first one the longest."""
    return [
        Prompt(f"The old {n}", Sampling(max_new_tokens=40 if n % 7 == 0 else 1 + n % 3, temperature=1.0, seed=n))
        for n in range(count)
    ]


def test_texts_come_in_order_and_each_is_what_it_is_alone(dataset):
    model = restless_model(dataset.tokenizer)
    prompts = prompts_of(20)
    made = list(continuations(Generator(model, max_rows=3), prompts))
    assert [each.prompt for each in made] == prompts
    for each in made:
        events = list(stream(model, each.prompt.text, each.prompt.sampling))
        assert each.text == text_of(events)
        assert each.events[-1].finish_reason == each.finish_reason == events[-1].finish_reason


def test_prompts_are_read_no_further_ahead_than_is_needed(dataset):
    read = 0

    def source():
        nonlocal read
        for prompt in prompts_of(24):
            read += 1
            yield prompt

    finished = 0
    for _, event in events_in_order(Generator(restless_model(dataset.tokenizer), max_rows=2), source()):
        assert read <= finished + 2 * AHEAD
        finished += event.finish_reason is not None
    assert finished == read == 24


def test_a_line_may_have_settings_of_its_own(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "é"}, {"prompt": "", "top_p": 1, "seed": 5, "stop": ["\n", "."], "logprobs": 2}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    assert check_prompts(path, DEFAULTS, PLAIN) == 2
    first, second = read_prompts(path, DEFAULTS, PLAIN)
    assert first == Prompt("é", DEFAULTS)
    assert second.text == ""
    assert second.sampling == Sampling(max_new_tokens=6, temperature=1.0, top_p=1, seed=5, stop=("\n", "."), logprobs=2)


def test_a_line_may_be_a_conversation(dataset, tmp_path):
    path, model = tmp_path / "chats.jsonl", restless_model(dataset.tokenizer)
    lines = [
        {"messages": [{"role": "user", "content": "The old"}], "stop": ["."]},
        {"prompt": "The old"},
        {"messages": [{"from": "human", "value": "The"}, {"from": "gpt", "value": "old"}], "seed": 3},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chat = ChatFormat(None, dataset.tokenizer)
    assert check_prompts(path, DEFAULTS, chat) == 3
    first, text, last = prompts = list(read_prompts(path, DEFAULTS, chat))
    assert (first.sampling.stop, text, last.sampling.seed) == ((".", *PLAIN_STOPS), Prompt("The old", DEFAULTS), 3)
    first_made, _, last_made = continuations(Generator(model, max_rows=3), prompts)
    for made, written in ((first_made, "User: The old\nAssistant:"), (last_made, "User: The\nAssistant: old")):
        assert made.text == text_of(stream(model, written, made.prompt.sampling))
    said = [{"role": "user", "content": "The"}, {"role": "assistant", "content": "old"}]
    wanted = {"messages": said, "continuation": last_made.text, "finish_reason": last_made.finish_reason}
    assert last_made.as_dict(dataset.tokenizer) == wanted
    ended = dataclasses.replace(first, ends=(first_made.events[0].token,))
    (made,) = continuations(Generator(model), [ended])
    assert (made.text, made.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "not a JSON object"),
        ('{"prompt": 3}', 'no object with a text "prompt", or else a list of "messages"'),
        ('{"prompt": "a", "messages": []}', 'no object with a text "prompt", or else a list of "messages"'),
        ('{"messages": ["a"]}', '"messages" is missing or is not a list of messages'),
        ('{"messages": [{"role": "robot", "content": "a"}]}', 'message 1 of "messages": the role is "robot"'),
        ('{"messages": [{"role": "user", "content": 1}]}', 'message 1 of "messages": "content" is missing'),
        ('{"prompt": "a", "tempreature": 1}', 'unknown setting "tempreature"; the settings are temperature,'),
        ('{"prompt": "a", "temperature": "warm"}', 'temperature must be a number, not "warm"'),
        ('{"prompt": "a", "top_k": 1.5}', "top_k must be an integer, not 1.5"),
        ('{"prompt": "a", "seed": true}', "seed must be an integer, not true"),
        ('{"prompt": "a", "stop": "x"}', 'stop must be a list of strings, not "x"'),
        ('{"prompt": "a", "top_p": 3}', "top_p must be above 0 and at most 1, not 3"),
        ('{"prompt": "a", "temperature": NaN}', "temperature must be from 0 to 100, not nan"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError) as error:
        check_prompts(path, DEFAULTS, PLAIN)
    assert f"{path}, line 3: {words}" in str(error.value)
    with pytest.raises(UserError, match="line 3"):
        list(read_prompts(path, DEFAULTS, PLAIN))


def test_all_invalid_lines_are_reported_up_to_a_limit(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{\n" * 3)
    with pytest.raises(UserError) as error:
        check_prompts(path, DEFAULTS, PLAIN)
    assert len(str(error.value).splitlines()) == 3
    path.write_text("{\n" * 1000)
    with pytest.raises(UserError, match="there may be more") as error:
        check_prompts(path, DEFAULTS, PLAIN)
    assert len(str(error.value).splitlines()) == 21
    with pytest.raises(UserError, match="cannot read"):
        check_prompts(tmp_path, DEFAULTS, PLAIN)
