"""The served model: one checkpoint of a run, and what it can do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.inference.chat_template import read_template
from lm.inference.fill_mask import Filled, fill_masks
from lm.inference.generator import Generator
from lm.inference.sampling import Sampling
from lm.inference.scoring import TokenProbability, token_probabilities
from lm.model.transformer import Transformer, describe
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, plain_settings
from lm.serve.schema import ApiError, Limits


@dataclass(frozen=True)
class Service:
    """One loaded checkpoint of a run.

    ``template`` is the run's own chat template, or None for plain turns. With ``compiled``, decoding steps are compiled
    before the first answer.
    """

    run: Run
    checkpoint: Checkpoint
    model: Transformer
    template: str | None
    limits: Limits
    compiled: bool = False

    @classmethod
    def open(
        cls, run: Run, checkpoint: Checkpoint, model: Transformer, limits: Limits, *, compiled: bool = False
    ) -> Service:
        return cls(run, checkpoint, model, read_template(run.path), limits, compiled)

    @property
    def name(self) -> str:
        """The name of the model in requests: that of the run's folder."""
        return self.run.path.resolve().name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    @property
    def context_length(self) -> int:
        return self.run.config.data.context_length

    @property
    def readouts(self) -> tuple[str, ...]:
        return self.run.config.readouts

    @property
    def masked_readout(self) -> str | None:
        """The readout that fills masks; None if the model was not trained for it."""
        return self.readouts[-1] if self.readouts[-1] != "next_token" else None

    @property
    def places(self) -> int:
        return self.limits.concurrent + self.limits.waiting

    def make_writer(self) -> Generator:
        rows = self.limits.concurrent
        writer = Generator(self.model, self.tokenizer, self.context_length, max_rows=rows, compiled=self.compiled)
        if writer.compiling:
            print(writer.compiling, file=sys.stderr, flush=True)
        return writer

    def check(self, model: str | None, texts: int = 1) -> None:
        """Raise ApiError if a request for ``texts`` texts names another model, or if this one cannot generate them."""
        if model is not None and model != self.name:
            raise ApiError(
                404,
                f'there is no model "{model}", only "{self.name}"',
                param="model",
                code="model_not_found",
            )
        if "next_token" not in self.readouts:
            raise ApiError(
                400,
                f"{self.name} was trained with {self.run.config.objective.objective} only: it can fill masks "
                "(POST /api/fill), but not continue text",
                code="unsupported_readout",
            )
        if texts > self.places:
            raise ApiError(400, f"the request asks for {texts:,} texts; this server accepts {self.places:,} at a time")

    def fill(self, text: str, top: int, rounds: int, sampling: Sampling) -> Iterator[Filled]:
        """One result, for ``Engine.compute``. Raises ApiError if the model cannot fill; iterating raises UserError."""
        readout = self.masked_readout
        if readout is None:
            raise ApiError(
                400,
                f"{self.name} was trained with {self.run.config.objective.objective} only: it can continue text "
                "(POST /v1/completions), but not fill masks",
                code="unsupported_readout",
            )

        def filled() -> Iterator[Filled]:
            yield fill_masks(
                self.model,
                self.tokenizer,
                text,
                readout,
                self.context_length,
                top=top,
                rounds=rounds,
                sampling=sampling,
            )

        return filled()

    def probabilities(self, tokens: list[int], readout: str, top: int) -> Iterator[list[TokenProbability]]:
        """The probabilities of a text's tokens, in parts, for ``Engine.compute``."""
        return token_probabilities(self.model, self.tokenizer, tokens, readout, self.context_length, top)

    def about(self) -> dict[str, Any]:
        """The body of ``/api/run``: the model, its limits and its settings."""
        return {
            "name": self.name,
            "description": describe(self.model),
            "parameters": self.model.parameter_counts(),
            "step": self.checkpoint.step,
            "objective": self.run.config.objective.objective,
            "readouts": list(self.readouts),
            "context_length": self.context_length,
            "vocabulary": self.tokenizer.vocab_size,
            "chat_template": self.template is not None,
            "limits": vars(self.limits),
            "settings": plain_settings(self.run.config),
        }
