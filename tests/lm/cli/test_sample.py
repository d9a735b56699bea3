"""``kindling sample`` beyond single prompts and fills, which ``test_cli`` has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from lm.cli.main import main
from lm.inference.generator import Generator
from tests.lm.cli.test_main import assert_refused, kindling
from tests.lm.inference.test_compiled_decoding import needs_compiler


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    return shutil.copytree(trained.path, tmp_path_factory.mktemp("sample") / "run")


def continuation_of(run, prompt, *options) -> str:
    result = kindling("sample", run, "--json", "--prompt", prompt, *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["continuation"]


def test_several_prompts_are_written_as_each_is_alone(run):
    prompts = ["The captain", "A", "Nobody"]
    options = ["--max-new-tokens", 15, "--rows", 2]
    result = kindling("sample", run, *options, *(word for prompt in prompts for word in ("--prompt", prompt)))
    alone = [prompt + continuation_of(run, prompt, *options) for prompt in prompts]
    assert result.stdout == "\n\n".join(alone) + "\n"


def test_prompts_from_standard_input_are_continued_to_standard_output(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "A"}\n{"prompt": "é", "seed": 2}\n', encoding="utf-8")
    options = ["--max-new-tokens", "5"]
    wanted = kindling("sample", run, "--input", "in.jsonl", *options).stdout
    given = (tmp_path / "in.jsonl").read_bytes()
    for output in ([], ["--output", "-"]):
        result = CliRunner().invoke(main, ["sample", str(run), "--input", "-", *output, *options], input=given)
        assert (result.exit_code, result.stdout) == (0, wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    result = CliRunner().invoke(main, ["sample", str(run), "--input", "-"], input='{"prompt": 1}\n')
    assert_refused(result, "standard input, line 1: ")


def test_a_message_that_is_no_text_ends_the_chat(run):
    for said in (b"caf\xe9\n", b"hello\ncaf\xe9\n"):
        result = CliRunner().invoke(main, ["sample", str(run), "--chat", "--max-new-tokens", "2"], input=said)
        assert result.exit_code == 2
        assert result.stderr == "error: the input is not UTF-8: convert it\n"


def test_a_file_of_prompts_becomes_a_file_of_continuations(run, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"The {word}" for word in ("old miller", "captain", "owl", "é")]
    source.write_text(
        "".join(json.dumps({"prompt": p, "seed": n, "max_new_tokens": 8}) + "\n" for n, p in enumerate(prompts))
    )
    result = kindling("sample", run, "--input", source, "--output", output, "--rows", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "4 texts, " in result.stderr
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for n, line in enumerate(lines):
        assert line["continuation"] == continuation_of(run, line["prompt"], "--seed", n, "--max-new-tokens", 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert kindling("sample", run, "--input", source).stdout == output.read_text(encoding="utf-8")
    assert_refused(kindling("sample", run, "--input", source, "--output", output), "already exists")
    source.write_text('{"prompt": 1}\nx\n')
    refused = kindling("sample", run, "--input", source, "--output", tmp_path / "other.jsonl")
    assert_refused(refused, "in.jsonl, line 1: ", "in.jsonl, line 2: not JSON")
    assert not (tmp_path / "other.jsonl").exists()


@needs_compiler
def test_a_compiled_model_writes_the_same_and_prints_how_long_compiling_took(run):
    options = ["--prompt", "The captain", "--temperature", 0, "--max-new-tokens", 8]
    plain, compiled = kindling("sample", run, *options), kindling("sample", run, *options, "--compile")
    assert compiled.exit_code == 0, compiled.output
    assert compiled.stdout == plain.stdout
    assert "compiled the step in " in compiled.stderr


def test_log_probabilities_of_each_token_are_printed(run):
    result = kindling(
        "sample", run, "--json", "--prompt", "The old", "--logprobs", 2, "--temperature", 0, "--max-new-tokens", 5
    )
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "length"
    assert "".join(token["token"] for token in answer["tokens"]) == answer["continuation"]
    for token in answer["tokens"]:
        best, second = token["top"]
        assert {name: token[name] for name in ("token", "id", "logprob")} == best  # greedy
        assert 0 >= best["logprob"] > second["logprob"]


def test_stop_strings_end_the_text(run):
    whole = continuation_of(run, "The captain", "--seed", 3)
    cut = continuation_of(run, "The captain", "--seed", 3, "--stop", whole[12:14], "--stop", "\0never")
    assert cut == whole[: whole.index(whole[12:14])]


def test_unmasking_continues_a_prompt_by_as_many_tokens(run):
    options = ["--unmask", 6, "--rounds", 2, "--prompt", "The old miller"]
    texts = [kindling("sample", run, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The old miller")
    answer = json.loads(kindling("sample", run, *options, "--json", "--top", 3).stdout)
    assert answer["fill"] == "The old miller[MASK:6]"
    assert [len(candidates) for candidates in answer["candidates"]] == [3] * 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unmask", "3"], "nothing to do"),
        (["--unmask", "3", "--fill", "[MASK]"], "--unmask continues prompts"),
        (["--prompt", "a", "--chat"], "--input and --chat cannot be combined"),
        (["--prompt", "a", "--output", "x"], "--output is the file for the continuations of --input"),
        (["--prompt", "a", "--logprobs", "2"], "--logprobs needs --json"),
        (["--prompt", "a", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["--fill", "[MASK]", "--top", "0"], "--top must be at least 1, not 0"),
        (["--chat", "--json"], "--chat cannot print JSON"),
        (["--prompt", "a", "--stop", ""], "stop must not contain an empty string"),
        (["--input", "/nowhere/in.jsonl"], "cannot read /nowhere/in.jsonl"),
    ],
)
def test_conflicting_options_are_refused(run, arguments, words):
    assert_refused(kindling("sample", run, *arguments), words)


def talk(run, text: str, *options: str):
    return CliRunner().invoke(main, ["sample", str(run), "--chat", "--max-new-tokens", "12", *options], input=text)


def test_a_chat_continues_the_whole_conversation(run, monkeypatch):
    prompts = []
    add = Generator.add
    monkeypatch.setattr(
        Generator,
        "add",
        lambda self, prompt, sampling, ends: (
            prompts.append((self._tokenizer.decode(prompt), sampling)) or add(self, prompt, sampling, ends)
        ),
    )
    result = talk(run, "The old miller\n\n a key \n")
    assert result.exit_code == 0, result.output
    (first, sampling), (second, _) = prompts
    assert first == "User: The old miller\nAssistant:"
    assert sampling.stop == ("\nUser:", "\nSystem:", "\nAssistant:")
    said = second.removeprefix(first).removesuffix("\nUser: a key\nAssistant:").strip()
    assert second == f"{first} {said}\nUser: a key\nAssistant:"
    assert result.stdout.startswith((said, " " + said))
    assert len(result.stdout.splitlines()) >= 2


def test_a_conversation_of_a_file_is_answered_as_in_a_chat(run, tmp_path):
    source, options = tmp_path / "in.jsonl", ("--max-new-tokens", "12", "--temperature", "0")
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "The captain"}]}))
    line = json.loads(kindling("sample", run, "--input", source, *options).stdout)
    assert line["continuation"].strip()
    assert line["continuation"].strip() == talk(run, "The captain\n", *options).stdout.strip()


def test_a_chat_takes_the_templates_of_the_run(run, monkeypatch):
    prompts = []
    add = Generator.add
    monkeypatch.setattr(
        Generator,
        "add",
        lambda self, prompt, sampling, ends: (
            prompts.append(self._tokenizer.decode(prompt)) or add(self, prompt, sampling, ends)
        ),
    )
    template = run / "chat_template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>")
    try:
        assert talk(run, "hello\n").exit_code == 0
        template.write_text("{{ nothing.at.all }}")
        assert talk(run, "hello\n").exit_code == 2
    finally:
        template.unlink()
    assert prompts == ["<user>hello<answer>"]


def test_an_interrupt_ends_the_answer_and_not_the_chat(run, monkeypatch):
    step, steps = Generator.step, []

    def interrupted(self):
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(Generator, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = talk(run, "The\nold\n", "--seed", "1", "--temperature", "0.3")
    assert result.exit_code == 0, result.output
    assert len(steps) <= 3 + 12
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_only_fills_masks_cannot_talk(small, quietly, tmp_path):
    masked = quietly(small.replace(objective="masked_token", steps=1), tmp_path / "masked").path
    assert_refused(kindling("sample", masked, "--chat"), "masked_token only", "but not continue a prompt")
    assert kindling("sample", masked, "--prompt", "a", "--unmask", "3").exit_code == 0
