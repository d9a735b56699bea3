"""From ``--extra-token chat`` to a served assistant: the same tokens in training, in the terminal and on the server."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lm.cli.main import main
from lm.inference.chat_template import ChatFormat
from lm.inference.generator import Generator
from lm.runs.directory import Run, open_run

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLORS = {"fox": "red", "owl": "grey", "boat": "white", "river": "blue"}
GREEDY = {"temperature": 1e-5, "max_tokens": 12}


def kindling(*arguments: object, stdin: str | None = None) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def assistant(text_folder, make_dataset, small, quietly, tmp_path_factory) -> Run:
    """A run that answers two questions in a row, each with a color."""
    folder = tmp_path_factory.mktemp("assistant")
    data = make_dataset(text_folder, folder / "data", vocab_size=400, extra_tokens=("chat",))
    base = quietly(small.replace(data=(str(data.directory),), steps=10), folder / "base")
    asked = [[first, second] for first in COLORS for second in COLORS] + [[only] for only in COLORS] * 2
    talks = [
        {
            "messages": [
                {"role": role, "content": text}
                for a in things
                for role, text in (("user", f"{a}?"), ("assistant", COLORS[a]))
            ]
        }
        for things in asked
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "chat.jinja").write_text(TEMPLATE)
    kindling(
        *("finetune", base.path, "--task", "instruction", "--train", folder / "talk.jsonl", "--run", folder / "run"),
        *("--chat-template", folder / "chat.jinja", "--epochs", 40, "--batch-examples", 16, "--learning-rate", 0.01),
        *("--dropout", 0, "--threads", 1, "--device", "cpu"),
    )
    return open_run(folder / "run")


@pytest.fixture(scope="module")
def answering(assistant, serving):
    with serving(assistant) as served:
        yield served


def test_the_tokens_of_the_template_are_special_everywhere(assistant, answering, monkeypatch):
    assert assistant.config.finetune.template_tokens == "special"
    prompts = []
    add = Generator.add
    monkeypatch.setattr(
        Generator,
        "add",
        lambda self, prompt, sampling, ends=(): prompts.append(list(prompt)) or add(self, prompt, sampling, ends),
    )
    said = [{"role": "user", "content": "<|user|> fox?<|end_of_turn|>"}]
    answering.ask("/v1/chat/completions", {"messages": said, **GREEDY})
    kindling("sample", assistant.path, "--chat", "--max-new-tokens", 1, stdin=said[0]["content"] + "\n")
    chat = ChatFormat(TEMPLATE, assistant.tokenizer)
    assert prompts == [chat.encode(said)] * 2
    names = [assistant.tokenizer.token_text(token) for token in prompts[0]]
    special = [name for name in names if name in assistant.tokenizer.special_tokens]
    assert special == ["<|user|>", "<|end_of_turn|>", "<|assistant|>"]
    assert assistant.tokenizer.decode(prompts[0]).startswith("<|user|><|user|> fox?<|end_of_turn|><|end_of_turn|>")
    said = [{"role": "user", "content": "fox?"}]
    peer = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(assistant.tokenizer.to_json()), bos_token="<|endoftext|>"
    )
    peer.chat_template = TEMPLATE
    start, *theirs = peer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert (start, theirs) == (assistant.tokenizer.end_of_text_id, chat.encode(said))


def test_answers_end_with_the_templates_token(assistant, answering):
    talk = [{"role": "user", "content": "fox?"}]
    choice = answering.ask("/v1/chat/completions", {"messages": talk, **GREEDY}).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("red", "stop")
    talk += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "owl?"}]
    choice = answering.ask("/v1/chat/completions", {"messages": talk, **GREEDY}).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("grey", "stop")
    written = kindling("sample", assistant.path, "--chat", "--temperature", 0, stdin="fox?\nowl?\n")
    assert written == "red\ngrey\n"


def test_the_assistants_last_words_are_continued(answering):
    for begun, rest in (("", "red"), ("red", "")):
        talk = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": begun}]
        answer = answering.ask("/v1/chat/completions", {"messages": talk, **GREEDY}).json["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (rest, "stop")


def test_a_merged_run_answers_the_same(assistant, tmp_path):
    kindling("merge", assistant.path, "--out", tmp_path / "merged")
    for path in (assistant.path, tmp_path / "merged"):
        assert kindling("sample", path, "--chat", "--temperature", 0, stdin="boat?\n") == "white\n"


def test_a_run_without_a_template_stops_at_the_users_turn(assistant, serving, tmp_path):
    run = shutil.copytree(assistant.path, tmp_path / "plain")
    (run / "chat_template.jinja").unlink()
    with serving(open_run(run)) as served:
        talk = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "The old"}]
        tokens = served.service.chat.encode(talk)
        assert served.service.model.tokenizer.decode(tokens) == "User: fox?\nAssistant: The old"
        assert served.service.chat.stops == ("\nUser:", "\nSystem:", "\nAssistant:")
