"""Continue many texts at once; requests can join and leave while others are being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.inference.decoding import decoder
from lm.inference.detokenizer import Detokenizer
from lm.inference.kv_cache import KVCache, ReadingPrompt
from lm.inference.language_model import LanguageModel
from lm.inference.sampling import Sampling, draw, filtered, log_probabilities, penalized, require_tokens, writable
from lm.model.device import staged


@dataclass(frozen=True)
class Event:
    """One generation step of one request.

    Attributes:
        handle: the request's, from ``Generator.add``.
        token: the token generated; None if the model ended the text instead.
        text: the text that can be shown now: whole characters, and nothing that may become part of a stop string.
        logprob: log-probability of the token in nats, if requested: under the model's own distribution over all
            tokens that can be generated, before penalties, temperature and filters.
        top_logprobs: the most likely tokens of that distribution with theirs, most likely first.
        finish_reason: None while the text continues; "stop" if the model or a stop string ended it, "length" after
            ``max_new_tokens``.
    """

    handle: int
    token: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: Literal["stop", "length"] | None = None


class _Request:
    """A text that is being written."""

    def __init__(
        self, handle: int, tokens: list[int], sampling: Sampling, tokenizer: Tokenizer, ends: Sequence[int]
    ) -> None:
        self.handle, self.tokens, self.sampling, self.ends = handle, tokens, sampling, ends
        self._prompt = tokens[tokens[0] == tokenizer.end_of_text_id :]  # an end of text at the start is not penalized
        self.detokenizer = Detokenizer(tokenizer, sampling.stop, after=tokens)
        self.written = 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._read: Tensor | None = None
        self._counts: Tensor | None = None

    def uniform(self) -> Tensor:
        """Return the next number in [0, 1) of this request's own random sequence."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)

    def penalized(self, logits: Tensor) -> Tensor:
        """Return logits (vocabulary,) after this request's penalties."""
        if self._read is None or self._counts is None:
            prompt = torch.tensor(self._prompt, dtype=torch.int64, device=logits.device)
            self._read, self._counts = prompt.bincount(minlength=len(logits)).float(), torch.zeros_like(logits)
        return penalized(logits, self.sampling, self._read, self._counts)

    def write(self, token: int) -> None:
        self.tokens.append(token)
        self.written += 1
        if self._counts is not None:
            self._counts[token] += 1


class Generator:
    """Generates text with one model for any number of requests, ``max_rows`` at a time; the others wait.

        generator = Generator(model)
        handle = generator.add("Once upon a time", Sampling())
        while generator.busy:
            for event in generator.step():
                print(event.text, end="")

    A text begins as in training, after an end-of-text token; that of an imported model begins as its tokenizer says
    (``Tokenizer.begun``). Any of the tokenizer's ``end_ids`` ends it. Beyond the model's ``context_length``,
    each new token sees the last ``context_length`` tokens, the most that the model was trained on; a row of the cache
    holds no more. The first ``len(self._live)`` rows of the cache belong to the live requests, in order.

    The result of a request depends only on its prompt and settings, not on the requests written at the same time.

    Args:
        reuse: when a prompt begins like the last text of its row, read only what is new, as in a chat. The keys and
            values then come from other forward passes and may differ by rounding errors.
        compiled: compile the step first (``lm.inference.compiled_decoding``), on a CPU for one text at a time;
            ``compiling`` then says how long that took, or why it failed.
    """

    def __init__(
        self, model: LanguageModel, *, max_rows: int = 16, reuse: bool = False, compiled: bool = False
    ) -> None:
        self._model, self._tokenizer, self._device = model.writer.eval(), model.tokenizer, model.device
        self.max_rows, self._reuse = max_rows, reuse
        self._cache = KVCache.empty(self._model.config, max_rows, model.context_length, self._model.head_weight)
        self.compiling = ""
        if compiled:
            from lm.inference.compiled_decoding import compiled_decoder  # the compiler takes a second to import

            self._next, self.compiling = compiled_decoder(self._model, self._cache)
        else:
            self._next = decoder(self._model, self._cache)
        self._waiting: deque[_Request] = deque()
        self._live: list[_Request] = []
        self._left_over: list[int] = []  # the tokens in the first row after the live ones
        self._handles = 0

    def add(self, prompt: Sequence[int] | str, sampling: Sampling, ends: Sequence[int] = ()) -> int:
        """Queue a request and return its handle, which all its events carry; the tokens ``ends`` end its text, too.

        Raise UserError, which lists all problems, for invalid settings or a token outside the vocabulary.
        """
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        problems = sampling.problems()
        if unknown := [token for token in ids if not 0 <= token < self._model.config.vocab_size]:
            problems.append(f"the prompt holds token {unknown[0]}, but the model has {self._model.config.vocab_size}")
        if problems:
            raise UserError("\n".join(problems))
        self._handles += 1
        self._waiting.append(_Request(self._handles, self._tokenizer.begun(ids), sampling, self._tokenizer, ends))
        return self._handles

    def cancel(self, handle: int) -> None:
        """Drop a request; does nothing if it has finished."""
        self._waiting = deque(request for request in self._waiting if request.handle != handle)
        for row, request in enumerate(self._live):
            if request.handle == handle:
                self._leave(row)
                return

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or being written."""
        return bool(self._waiting or self._live)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Move waiting requests to free rows, generate a token per live text, and return an event for each of them."""
        while self._waiting and len(self._live) < self.max_rows:
            self._join(self._waiting.popleft())
        if not self._live:
            return []
        # (rows, vocabulary), in float32, where the step left them: only the tokens drawn go to the CPU
        logits = writable(self._next([request.tokens[-1] for request in self._live]), self._tokenizer)
        chosen = self._choose(logits)
        events = [self._event(*each) for each in zip(self._live, chosen, logits, strict=True)]
        for row in reversed(range(len(events))):
            if events[row].finish_reason:
                self._leave(row)
        return events

    def _join(self, request: _Request) -> None:
        """Read all but the last token of a prompt; that one is read in the next step of all rows."""
        row = len(self._live)
        self._cache.lengths[row] = self._reusable(request.tokens)
        count = len(request.tokens) - 1 - self._cache.lengths[row]
        if count:
            reading = ReadingPrompt(self._cache, row, count)
            inputs = torch.tensor([request.tokens[self._cache.lengths[row] : -1]], device=self._device)
            self._model(inputs, reading.positions, reading.lo, reading.hi, reading)
            reading.done()
        self._live.append(request)
        self._left_over = []

    def _reusable(self, tokens: list[int]) -> int:
        """Return how many of the first tokens the next free row of the cache already holds."""
        if not self._reuse:
            return 0
        held = self._left_over
        different = (i for i, (a, b) in enumerate(zip(held, tokens[:-1], strict=False)) if a != b)
        same = next(different, min(len(held), len(tokens) - 1))
        # Going back would need tokens that may have been overwritten.
        return same if same == len(held) or len(held) <= self._cache.capacity else 0

    def _leave(self, row: int) -> None:
        """Free a row by moving the last live row there."""
        last = len(self._live) - 1
        request = self._live.pop(row)
        if row == last:
            self._left_over = request.tokens[: self._cache.lengths[row]]
        else:
            self._live.insert(row, self._live.pop())
            self._cache.move(last, row)
            self._left_over = []

    def _choose(self, logits: Tensor) -> list[int]:
        """Choose the next token of each live text; rows with equal filters are filtered together."""
        if any(request.sampling.has_penalties for request in self._live):
            pairs = zip(self._live, logits, strict=True)
            logits = torch.stack([each.penalized(row) if each.sampling.has_penalties else row for each, row in pairs])
        groups: dict[tuple[float, ...], list[int]] = {}
        for row, request in enumerate(self._live):
            groups.setdefault(request.sampling.filters, []).append(row)
        chosen = [0] * len(self._live)
        for rows in groups.values():
            sampling = self._live[rows[0]].sampling
            of_group = logits if len(rows) == len(logits) else logits[rows]
            if sampling.is_greedy:
                tokens = of_group.argmax(-1)
            else:
                uniforms = staged(torch.cat([self._live[row].uniform() for row in rows]), logits.device)
                uniforms = uniforms.to(logits.device, non_blocking=True)
                tokens = draw(filtered(of_group, sampling), uniforms)
            for row, token in zip(rows, require_tokens(tokens.tolist(), logits.shape[-1]), strict=True):
                chosen[row] = token
        return chosen

    def _event(self, request: _Request, token: int, logits: Tensor) -> Event:
        """Append the token and return its event."""
        if token in self._tokenizer.end_ids or token in request.ends:
            return Event(request.handle, None, request.detokenizer.finish(), finish_reason="stop")
        request.write(token)
        text = request.detokenizer.add(token)
        reason: Literal["stop", "length"] | None = "stop" if request.detokenizer.stopped else None
        if reason is None and request.written == request.sampling.max_new_tokens:
            text += request.detokenizer.finish()
            reason = "length"
        if request.sampling.logprobs is None:
            return Event(request.handle, token, text, finish_reason=reason)
        log_p, top = log_probabilities(logits, request.sampling.logprobs)
        return Event(request.handle, token, text, float(log_p[token]), tuple(top), reason)


def stream(model: LanguageModel, prompt: Sequence[int] | str, sampling: Sampling) -> Iterator[Event]:
    """Continue one text and yield the events of ``Generator`` as they come."""
    generator = Generator(model, max_rows=1)
    generator.add(prompt, sampling)
    while generator.busy:
        yield from generator.step()
