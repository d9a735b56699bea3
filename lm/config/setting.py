"""What is known of one setting besides its value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """One setting, as the command line and the recipes see it.

    Attributes:
        default: its type is the setting's type.
        minimum, maximum: limits of a number, inclusive; a whole number without a maximum is at most 2^53.
        on_resume: what happens if it differs when a run is resumed. "free": nothing, it changes neither the model nor
            the order of the data. "ask": it needs --resume. "never": the run is refused, since its weights or the
            meaning of a step depend on it.
        finetuning: the default in fine-tuning; None: the same.
        pretraining_only: fine-tuning derives it from its own settings, or does without.
        of_task: part of what a task is in a table of tasks, not of how a model is fine-tuned on it.
    """

    name: str
    section: str
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    on_resume: Literal["free", "ask", "never"]
    finetuning: Any
    pretraining_only: bool
    of_task: bool

    @property
    def kind(self) -> str:
        """Its type, as help and messages name it."""
        return {bool: "true|false", int: "integer", float: "number", str: "text", tuple: "list of texts"}[
            type(self.default)
        ]

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    on_resume: Literal["free", "ask", "never"] = "ask",
    finetuning: Any = None,
    pretraining_only: bool = False,
    of_task: bool = False,
) -> Any:
    """A dataclass field that describes a ``Setting``; the arguments are its attributes."""
    return field(default=default, metadata={name: value for name, value in locals().items() if name != "default"})
