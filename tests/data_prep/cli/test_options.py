from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import pytest
from click.testing import CliRunner

from data_prep.cli.options import options_of
from data_prep.settings import BuildSettings, CleaningSettings, ReadSettings, TokenizerSettings, setting


@dataclass(frozen=True)
class Settings:
    plain: str = "not an option"
    some_number: int = setting(3, "A number.", minimum=1)
    share: float = setting(0.5, "A share.")
    flag: bool = setting(False, "A flag.")
    way: str = setting("", "A way.", choices=("", "this", "that"))
    names: tuple[str, ...] = setting((), "A name.")


def called(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    @click.command()
    @options_of(Settings)
    def command(**options: Any) -> None:
        found.update(options)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return found | {"output": result.output}


def test_options_have_the_names_types_and_defaults_of_the_fields() -> None:
    defaults = {"some_number": 3, "share": 0.5, "flag": False, "way": "", "names": ()}
    assert called() == defaults | {"output": ""}
    given = called("--some-number", "4", "--share", "1", "--flag", "--way", "that", "--name", "a", "--name", "b")
    assert given == {"some_number": 4, "share": 1.0, "flag": True, "way": "that", "names": ("a", "b"), "output": ""}


def test_help_shows_explanations_choices_and_defaults() -> None:
    shown = " ".join(called("--help")["output"].split())
    assert "--some-number INTEGER A number. [default: 3]" in shown
    assert "--way [this|that] A way. --name TEXT A name." in shown
    assert "--flag A flag." in shown and "plain" not in shown


@pytest.mark.parametrize("kind", [ReadSettings, CleaningSettings, TokenizerSettings])
def test_the_options_of_a_group_make_its_defaults(kind: Any) -> None:
    @click.command()
    @options_of(kind)
    def command(**options: Any) -> None:
        assert kind(**options) == kind()

    assert CliRunner().invoke(command, []).exit_code == 0
    names = {parameter.name for parameter in command.params}
    assert not names & {parameter.name for parameter in options_of(BuildSettings)(click.Command("x")).params}  # type: ignore[attr-defined]
