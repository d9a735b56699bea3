"""What is known of one setting besides its value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fractions import Fraction


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
        once_in: the section that files of earlier versions have it in.
        mixture: several choices may be joined, each with its share: "one:0.75,another:0.25" (``shares_of``).
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
    once_in: str
    mixture: bool

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
    once_in: str = "",
    mixture: bool = False,
) -> Any:
    """A dataclass field that describes a ``Setting``; the arguments are its attributes."""
    return field(default=default, metadata={name: value for name, value in locals().items() if name != "default"})


def shares_of(mixture: str) -> dict[str, Fraction]:
    """The names in "one:0.75,another:0.25" with their shares, which add up to 1; a single name has the share 1.

    Raises:
        ValueError: with what is wrong, as the end of a sentence.
    """
    from fractions import Fraction  # here, because --help should be quick

    if ":" not in mixture and "," not in mixture:
        return {mixture: Fraction(1)}
    shares: dict[str, Fraction] = {}
    for part in mixture.split(","):
        name, _, share = part.strip().partition(":")
        if name in shares:
            raise ValueError(f"names {name} twice")
        try:
            shares[name] = Fraction(share.strip())
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"needs a share for {name}, as in {name}:0.25") from None
        if not 0 < shares[name] < 1:
            raise ValueError(f"needs a share between 0 and 1 for {name}, not {share.strip()}")
    if (total := sum(shares.values())) != 1:
        raise ValueError(f"has shares that add up to {float(total):g} instead of 1")
    return shares


def spelled(value: Any) -> str:
    """The value of a setting as a reader wants it: an empty list as nothing, a number in the shortest exact way."""
    if isinstance(value, (tuple, list)):
        return ", ".join(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
