"""The help of every command, found by walking the tree of commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from data_prep.cli.help import SectionOption
from lm.cli.main import main

SCREEN, WIDTH = 40, 80


def tree(command, words=()):
    yield words, command
    for name, each in getattr(command, "commands", {}).items():
        yield from tree(each, (*words, name))


COMMANDS = dict(tree(main))


@pytest.fixture
def shown():
    """What a command prints on a terminal of 80 columns: (words, option) → text."""

    def run(words, option):
        result = CliRunner().invoke(main, [*words, option], prog_name="kindling", terminal_width=WIDTH)
        assert result.exit_code == 0, result.output
        return result.output

    return run


every_command = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "kindling")


def options_of(command):
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def records(text):
    """The names of the options that a help shows, each by its first name."""
    return re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", text, re.MULTILINE)


@every_command
def test_the_help_fits_on_one_screen(words, shown):
    text = shown(words, "--help")
    lines = sum(-(-max(1, len(line)) // WIDTH) for line in text.splitlines())
    assert lines <= SCREEN
    assert shown(words, "-h") == text


@every_command
def test_the_whole_help_has_every_option_once_with_all_that_is_said_about_it(words, shown):
    text = shown(words, "--help-all")
    listed = records(text)
    assert sorted(listed) == sorted({*listed})
    assert {each.opts[0] for each in options_of(COMMANDS[words])} <= {*listed}
    unbroken = "".join(text.split())  # lines break after hyphens too
    for option in options_of(COMMANDS[words]):
        assert option.help, option.name
        assert "".join(option.help.split()) in unbroken, option.name


@every_command
def test_the_help_leaves_out_nothing_without_saying_where_it_is(words, shown):
    short, whole = shown(words, "--help"), shown(words, "--help-all")
    assert ("--help-all" in short) == (short != whole)
    assert {*records(short)} <= {*records(whole)}
    if words:
        assert {each.opts[0] for each in options_of(COMMANDS[words]) if each.required} <= {*records(short)}


@every_command
def test_sections_name_options_that_exist_each_in_one_place(words):
    command = COMMANDS[words]
    named = [name for section in command.sections for name in f"{section.common} {section.more}".split()]
    assert len(named) == len({*named})
    assert {*named} <= {each.name for each in options_of(command)}
    hidden = {name for section in command.sections for name in section.more.split()}
    assert not hidden & {each.name for each in options_of(command) if isinstance(each, SectionOption)}


@every_command
def test_summaries_are_whole_sentences(words):
    for name, command in getattr(COMMANDS[words], "commands", {}).items():
        summary = command.get_short_help_str(WIDTH - 20)
        assert summary.endswith(".") and "..." not in summary, name


def test_the_settings_of_a_recipe_are_grouped_by_its_sections(shown):
    for words in (("train",), ("finetune",), ("tasks",)):
        whole = shown(words, "--help-all")
        for option in options_of(COMMANDS[words]):
            if isinstance(option, SectionOption):
                group = whole.partition(f"\n{option.section}:\n")[2].partition("\n\n")[0]
                assert option.opts[0] in records(group), option.name


def test_no_help_waits_for_heavy_imports():
    program = """
import json, sys
from click.testing import CliRunner
from lm.cli.main import main
for words in json.loads(sys.argv[1]):
    assert CliRunner().invoke(main, words).exit_code == 0, words
print(sorted({"torch", "numpy", "tokenizers", "datasets", "pyarrow", "matplotlib", "rich"} & sys.modules.keys()))
"""
    asked = json.dumps([[*words, option] for words in COMMANDS for option in ("-h", "--help-all")])
    done = subprocess.run([sys.executable, "-c", program, asked], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_whole_help_lists_the_commands_of_commands(shown):
    assert re.search(r"^  prep verify +Read a whole dataset", shown((), "--help-all"), re.MULTILINE)
    assert "prep verify" not in shown((), "--help")
