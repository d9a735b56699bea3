"""The settings of sampling, for the command line and for Python; ``lm.inference.sampling`` applies them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import read_json
from lm.config.setting import setting

# Files of a run directory, named as in transformers (``lm.runs.companions``).
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
MOST_LOGPROBS = 20
GREEDY_BELOW = 0.01  # such temperatures stand for 0, which some servers refuse
ORDERS = ("confidence", "random")  # in which masks are filled
MASK_WORD, GAP = "[MASK]", "[GAP]"
MASKS = re.compile(r"\[MASK(?::([1-9]\d{0,6}))?\]")


def problem_of_fill(text: str) -> str:
    """Why there is nothing to fill in a text; "" if there is a mask."""
    if MASKS.search(text):
        return ""
    shown = text if len(text) < 60 else f"{text[:56]} …"
    if other := re.search(r"[\[<]mask(:[1-9]\d{0,6})?[\]>]", text, re.IGNORECASE):
        return f'nothing to fill in "{shown}": write [MASK{other[1] or ""}] for {other[0]}'
    return f'nothing to fill in "{shown}": write {MASK_WORD} where a word is missing'


def problem_of_infill(text: str) -> str:
    """Why there is no gap to write in; "" if there is one."""
    shown, gaps = text if len(text) < 60 else f"{text[:56]} …", text.count(GAP)
    return "" if gaps == 1 else f'"{shown}" has {gaps or "no"} gaps: write {GAP} once, where text is missing'


@dataclass(frozen=True)
class Sampling:
    """How to continue a text. The filters apply in the order of their fields, after the temperature."""

    temperature: float = setting(
        0.8,
        "how random the choice is; below 1: safer; above 1: more varied; below 0.01: always take the most likely token",
    )
    top_k: int = setting(0, "draw from the k most likely tokens; 0: from all")
    top_p: float = setting(1.0, "draw from the most likely tokens that together reach this probability")
    min_p: float = setting(0.0, "drop tokens whose probability is below this fraction of the top token's")
    typical_p: float = setting(
        1.0, "draw from the tokens closest to the expected information that together reach this probability"
    )
    repetition_penalty: float = setting(1.0, "make tokens of the prompt and of the new text less likely; 1: off")
    presence_penalty: float = setting(0.0, "subtract this from the logit of every generated token; 0: off")
    frequency_penalty: float = setting(0.0, "subtract this for each time the token was generated; 0: off")
    max_new_tokens: int = setting(200, "generate at most this many tokens")
    stop: tuple[str, ...] = setting((), "stop before this text")
    seed: int = setting(0, "random seed; the same seed gives the same text")
    logprobs: int | None = setting(
        None, "return the log-probability of each token and of this many most likely ones; None: neither"
    )

    def problems(self) -> list[str]:
        """Return one sentence per value that is out of range."""
        s = self
        limits = [
            (0 <= s.temperature <= 100, "temperature", "must be from 0 to 100"),
            (s.top_k >= 0, "top_k", "must be at least 0"),
            (0 < s.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (0 <= s.min_p <= 1, "min_p", "must be between 0 and 1"),
            (0 < s.typical_p <= 1, "typical_p", "must be above 0 and at most 1"),
            (0.01 <= s.repetition_penalty <= 100, "repetition_penalty", "must be from 0.01 to 100"),
            (-100 <= s.presence_penalty <= 100, "presence_penalty", "must be from -100 to 100"),
            (-100 <= s.frequency_penalty <= 100, "frequency_penalty", "must be from -100 to 100"),
            (s.max_new_tokens >= 1, "max_new_tokens", "must be at least 1"),
            (all(s.stop), "stop", "must not contain an empty string"),
            (0 <= s.seed < 2**63, "seed", "must be at least 0 and below 2^63"),
            (s.logprobs is None or 0 <= s.logprobs <= MOST_LOGPROBS, "logprobs", f"must be from 0 to {MOST_LOGPROBS}"),
        ]
        return [f"{name} {rule}, not {getattr(self, name)}" for holds, name, rule in limits if not holds]

    @property
    def filters(self) -> tuple[float, int, float, float, float]:
        """The settings that ``lm.inference.sampling.filtered`` uses; rows with equal ones can be filtered together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def recommended(run_directory: Path) -> dict[str, Any]:
    """The fields of ``Sampling`` that the run's ``generation_config.json`` sets; an imported checkpoint brought it.

    ``do_sample`` false is temperature 0. Settings that ``Sampling`` lacks, such as beam search, are not applied.

    Raises:
        UserError: the file is damaged, or a value is out of range.
    """
    path = run_directory / GENERATION
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        names = [field.name for field in dataclasses.fields(Sampling) if field.name not in ("stop", "seed", "logprobs")]
        found = {name: content[name] for name in names if content.get(name) is not None}
        if content.get("do_sample") is False:
            found["temperature"] = 0.0
        problems = dataclasses.replace(Sampling(), **found).problems()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return found
