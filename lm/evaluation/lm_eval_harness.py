"""A run as a model for lm-evaluation-harness (the extra ``harness``), registered as "kindling".

    import lm.evaluation.lm_eval_harness
    lm_eval.simple_evaluate(model="kindling", model_args="pretrained=runs/mine,readout=masked_next_token", tasks=[…])

or ``kindling harness``. Texts begin after an end-of-text token, as every document did in training; the harness's own
``hf`` model does the same with an exported run if ``add_bos_token=True``. Requests are packed, so the batch size has no
effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from data_prep.errors import UserError
from lm.evaluation.perplexity import document_queries
from lm.inference.generator import Generator
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling
from lm.inference.scoring import Query, text_queries, token_scores
from lm.model.device import choose_device
from lm.runs.directory import open_run

MAX_NEW_TOKENS = 256  # unless the task says otherwise


@register_model("kindling")
class KindlingLM(LM):
    """A run for the harness, with the readout that scores. UserError if there is no such run, checkpoint or readout.

    Args:
        pretrained: the run directory.
        readout: "next_token" gives log-likelihoods, a masked readout pseudo-log-likelihoods (Salazar et al. 2020);
            "greedy" then says whether each token is the most likely one at its mask. "": the run's first.
        checkpoint: newest, best, or the number of a step.
        batch_size, max_batch_size: passed by the harness to every model; not used.
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
        saved = run.checkpoint(str(checkpoint))
        self.step = saved.step
        self.model = LanguageModel(run.load_model(choose_device(device), saved), run.tokenizer, run.config)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return per request, (context, continuation), the log-probability of the continuation and if it is greedy.

        Input that is too long loses the beginning of its context, or of the continuation.
        """
        queries = (
            query
            for owner, (tokens, first) in enumerate(self._encode(*request.args) for request in requests)
            for query in text_queries(tokens, owner, self.readout, self.model.tokenizer, first)
        )
        return self._sums(queries, len(requests))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return per request, (text,), its log-probability, in adjacent windows, the last reaching back."""
        stride, texts = (
            self.model.context_length,
            (self.model.tokenizer.encode(request.args[0]) for request in requests),
        )
        queries = (
            query
            for owner, text in enumerate(texts)
            for query in document_queries(self.model, owner, text, self.readout, stride, ends=False)
        )
        return [logprob for logprob, _ in self._sums(queries, len(requests))]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return per request, (context, settings), the text generated up to a string of ``until`` or the end."""
        if self.readout != "next_token":
            raise UserError(f"{self.readout} fills masks and cannot generate text: choose readout=next_token")
        generator = Generator(self.model)
        written = {}
        for request in requests:
            context, settings = request.args
            prompt = self.model.tokenizer.encode(context)[-(self.model.context_length - 1) :]
            written[generator.add(prompt, _sampling(settings))] = ""
        while generator.busy:
            for event in generator.step():
                written[event.handle] += event.text
        return list(written.values())

    def _encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the tokens of both, and where the continuation begins; spaces at the border belong to it."""
        border = len(context.rstrip())
        context, continuation = context[:border], context[border:] + continuation
        first = len(self.model.tokenizer.encode(context))
        tokens = self.model.tokenizer.encode(context + continuation)
        excess = max(0, len(tokens) - (self.model.context_length - (self.readout != "next_token")))
        return tokens[excess:], max(0, first - excess)

    def _sums(self, queries: Iterator[Query], owners: int) -> list[tuple[float, bool]]:
        """Return per owner the log-probability of all its targets, and whether all of them are greedy."""
        logprobs, greedy = np.zeros(owners), np.ones(owners, dtype=bool)
        for scores in token_scores(self.model, queries, self.readout):
            np.add.at(logprobs, scores.owners, scores.logprobs)
            np.logical_and.at(greedy, scores.owners, scores.greedy)
        return list(zip(logprobs.tolist(), greedy.tolist(), strict=True))


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Translate the harness's generation settings; greedy unless they ask for sampling."""
    until = settings.get("until") or []
    greedy = not settings.get("do_sample", False)
    return Sampling(
        temperature=0.0 if greedy else float(settings.get("temperature", 1.0)),
        top_k=0 if greedy else int(settings.get("top_k", 0)),
        top_p=1.0 if greedy else float(settings.get("top_p", 1.0)),
        max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
        stop=tuple([until] if isinstance(until, str) else [text for text in until if text]),
    )
