"""The served model: one checkpoint of a run, and what it can do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lm.config.sampling import recommended
from lm.config.shown import shown_values
from lm.data.openings import Opening
from lm.inference.chat_template import ChatFormat, chat_format
from lm.inference.fill_mask import Filled, fill_masks
from lm.inference.generator import Generator
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.inference.scoring import TokenProbability, token_probabilities
from lm.model.transformer import Transformer
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, plain_settings
from lm.runs.run_data import openings_of
from lm.serve.schema import OPENAI, ApiError, Limits


@dataclass(frozen=True)
class Service:
    """One loaded checkpoint of a run.

    ``chat`` is how conversations are written. With ``compiled``, decoding steps are compiled before the first answer.
    ``defaults`` are for requests that leave settings out: those of OpenAI, or of an imported model's
    ``generation_config.json``.
    """

    run: Run
    checkpoint: Checkpoint
    model: LanguageModel
    chat: ChatFormat
    limits: Limits
    defaults: Sampling
    compiled: bool = False

    @classmethod
    def open(
        cls, run: Run, checkpoint: Checkpoint, model: Transformer, limits: Limits, *, compiled: bool = False
    ) -> Service:
        whole = LanguageModel(model, run.tokenizer, run.config)
        defaults = replace(OPENAI, **recommended(run.path))
        chat = chat_format(run.path, run.tokenizer, run.config)
        return cls(run, checkpoint, whole, chat, limits, defaults, compiled)

    @property
    def name(self) -> str:
        """The name of the model in requests: that of the run's folder."""
        return self.run.path.resolve().name

    @property
    def places(self) -> int:
        """The largest number of texts that can be written or wait."""
        return self.limits.concurrent + self.limits.waiting

    def make_writer(self) -> Generator:
        """Return the generator of all answers."""
        writer = Generator(self.model, max_rows=self.limits.concurrent, compiled=self.compiled)
        if writer.compiling:
            print(writer.compiling, file=sys.stderr, flush=True)
        return writer

    def check(self, model: str | None, texts: int = 1) -> None:
        """Raise ApiError if a request for ``texts`` texts names another model, or if this one cannot generate them."""
        if model is not None and model != self.name:
            message = f'there is no model "{model}", only "{self.name}"'
            raise ApiError(404, message, param="model", code="model_not_found")
        if "next_token" not in self.model.readouts:
            raise self._unsupported("fill masks (POST /api/fill), but not continue text")
        if texts > self.places:
            raise ApiError(400, f"the request asks for {texts:,} texts; at most {self.places:,} are accepted at once")

    def _unsupported(self, abilities: str) -> ApiError:
        objective = self.run.config.objective.objective
        message = f"{self.name} was trained with {objective} only: it can {abilities}"
        return ApiError(400, message, code="unsupported_readout")

    def fill(self, text: str, top: int, rounds: int, sampling: Sampling) -> Iterator[Filled]:
        """Return one result, for ``Engine.compute``. Raises ApiError now if the model cannot fill, UserError later."""
        if self.model.masked_readout is None:
            raise self._unsupported("continue text (POST /v1/completions), but not fill masks")
        # A generator, because the engine's thread computes it.
        return (fill_masks(self.model, each, top=top, rounds=rounds, sampling=sampling) for each in (text,))

    def probabilities(self, tokens: list[int], readout: str, top: int) -> Iterator[list[TokenProbability]]:
        """The probabilities of a text's tokens, in parts, for ``Engine.compute``."""
        return token_probabilities(self.model, tokens, readout, top)

    @cached_property
    def openings(self) -> list[Opening]:
        """Texts of the run's own data to begin with; none if it is gone."""
        return openings_of(self.run)

    def about(self) -> dict[str, Any]:
        """The body of ``/api/run``: the model, its limits and its settings."""
        return {
            "name": self.name,
            "reads": "text",
            "description": self.model.model.describe(),
            "parameters": self.model.model.parameter_counts(),
            "step": self.checkpoint.step,
            "objective": self.run.config.objective.objective,
            "readouts": list(self.model.readouts),
            "context_length": self.model.context_length,
            "vocabulary": self.model.tokenizer.vocab_size,
            "chat_template": self.chat.template is not None,
            "openings": [opening._asdict() for opening in self.openings],
            "limits": vars(self.limits),
            "settings": plain_settings(self.run.config),
            "sections": shown_values(self.run.config),
        }
