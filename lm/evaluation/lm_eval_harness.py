"""A run as a model of lm-evaluation-harness (the extra ``harness``), registered under the name "kindling".

    import lm.evaluation.lm_eval_harness
    lm_eval.simple_evaluate(model="kindling", model_args="pretrained=runs/mine,readout=masked_next_token", tasks=[…])

or ``kindling harness``. Texts begin, as every document did in training, after an end-of-text token; that is what the
harness's own ``hf`` model does with an exported run when it is given ``add_bos_token=True``. Requests are packed, so
its batch size means nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from data_prep.errors import UserError
from lm.evaluation.perplexity import questions_of
from lm.inference.generator import Generator
from lm.inference.sampling import Sampling
from lm.inference.scoring import Question, ask, questions
from lm.model.device import choose_device
from lm.runs.directory import open_run

MAX_NEW_TOKENS = 256  # where a task does not say


@register_model("kindling")
class KindlingLM(LM):
    """A run for the harness, with the readout that it is to score by.

    Args:
        pretrained: the run directory.
        readout: "next_token" gives log-likelihoods; a masked readout pseudo-log-likelihoods (Salazar et al. 2020), of
            which "greedy" is whether each token is the likeliest behind its mask. "": the run's first.
        checkpoint: newest, best, or the number of a step.
        batch_size, max_batch_size: what the harness passes to every model; not used.

    Raises:
        UserError: there is no such run, checkpoint or readout.
    """

    def __init__(
        self,
        pretrained: str,
        readout: str = "",
        checkpoint: str | int = "newest",
        device: str = "auto",
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        run = open_run(pretrained)
        readouts = run.config.readouts
        self.readout = readout or readouts[0]
        if self.readout not in readouts:
            raise UserError(f"{run.path} was trained for {' and '.join(readouts)}, not for {readout}")
        self.tokenizer, self.context_length = run.tokenizer, run.config.data.context_length
        saved = run.checkpoint(str(checkpoint))
        self.step = saved.step
        self.model = run.load_model(choose_device(device), saved)
        self.folds = max(1, round(1 / run.config.objective.validation_mask_rate))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request, (context, continuation): log-probability of the continuation, and whether it is greedy.

        What is too long loses the beginning of its context, or of itself.
        """
        asked = (
            question
            for owner, request in enumerate(requests)
            for question in self._behind(owner, *self._encode(*request.args))
        )
        return [(nats, greedy) for nats, greedy in self._sums(asked, len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each request, (text,): its log-probability, in windows side by side, the last reaching back."""
        context = self.context_length
        asked = (
            question
            for owner, request in enumerate(requests)
            for question in questions_of(
                owner,
                self.tokenizer.encode(request.args[0]),
                self.tokenizer,
                self.readout,
                context,
                context,
                self.folds,
                ends=False,
            )
        )
        return [nats for nats, _ in self._sums(asked, len(requests))]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each request, (context, settings): what is written until one of the texts ``until``, or the end."""
        if self.readout != "next_token":
            raise UserError(f"{self.readout} fills masks and writes no text: choose readout=next_token")
        generator = Generator(self.model, self.tokenizer, self.context_length)
        written = {}
        for request in requests:
            context, settings = request.args
            prompt = self.tokenizer.encode(context)[-(self.context_length - 1) :]
            written[generator.add(prompt, _sampling(settings))] = ""
        while generator.busy:
            for event in generator.step():
                written[event.handle] += event.text
        return list(written.values())

    def _encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, and where those of the continuation begin; spaces at the border belong to it."""
        border = len(context.rstrip())
        context, continuation = context[:border], context[border:] + continuation
        first = len(self.tokenizer.encode(context))
        tokens = self.tokenizer.encode(context + continuation)
        excess = max(0, len(tokens) - (self.context_length - (self.readout != "next_token")))
        return tokens[excess:], max(0, first - excess)

    def _behind(self, owner: int, tokens: list[int], first: int) -> Iterator[Question]:
        return iter(questions(tokens, owner, self.readout, self.tokenizer, first))

    def _sums(self, asked: Iterator[Question], owners: int) -> Iterator[tuple[float, bool]]:
        """The log-probability of all that an owner asked for, and whether all of it was the likeliest."""
        nats, likeliest = np.zeros(owners), np.ones(owners, dtype=bool)
        for answers in ask(self.model, self.tokenizer, asked, self.readout, self.context_length):
            np.add.at(nats, answers.owners, answers.nats)
            np.logical_and.at(likeliest, answers.owners, answers.likeliest)
        return zip(nats.tolist(), likeliest.tolist(), strict=True)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """The harness's settings of a generation as ours; greedy unless it is told to sample."""
    until = settings.get("until") or []
    greedy = not settings.get("do_sample", False)
    return Sampling(
        temperature=0.0 if greedy else float(settings.get("temperature", 1.0)),
        top_k=0 if greedy else int(settings.get("top_k", 0)),
        top_p=1.0 if greedy else float(settings.get("top_p", 1.0)),
        max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
        stop=tuple([until] if isinstance(until, str) else [text for text in until if text]),
    )
