"""``/api`` of a language model: what OpenAI's API lacks; the web page uses it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import MASK_WORD
from lm.inference.sampling import Sampling
from lm.inference.scoring import TokenProbability, texts_of_tokens
from lm.serve.answers import token_name
from lm.serve.engine import Engine
from lm.serve.guard import read_json, unless_disconnected
from lm.serve.schema import LARGEST_SEED, MOST_ALTERNATIVES, MOST_ROUNDS, Fields, check_size, encode_prompt
from lm.serve.service import Service


@dataclass(frozen=True)
class KindlingAPI:
    """The endpoints that take a text, beyond OpenAI's."""

    service: Service
    engine: Engine

    async def fill(self, request: Request) -> Response:
        """Fill ``text`` with [MASK]: the filled text, in pieces, and the ``top`` most likely tokens for each mask.

        In at most ``rounds`` passes, because nothing else is computed meanwhile; sampled by ``temperature``, ``seed``.
        """
        fields = Fields(await read_json(request, self.service.limits.body_bytes))
        text, top = fields.text("text"), fields.integer("top", 5, 1, MOST_ALTERNATIVES)
        rounds = fields.integer("rounds", MOST_ROUNDS, 1, MOST_ROUNDS)
        temperature, seed = fields.number("temperature", 0.0, 0, 100), fields.integer("seed", 0, 0, LARGEST_SEED - 1)
        sampling = Sampling(temperature=temperature, seed=seed)
        fields.refuse(sampling)
        fields.done()
        await asyncio.to_thread(check_size, text.replace(MASK_WORD, ""), self.service.model, "text")
        work = self.engine.compute(self.service.fill(text, top, rounds, sampling))
        (filled,) = await unless_disconnected(request, work)
        pieces = [{"text": piece, "filled": is_filled} for piece, is_filled in filled.pieces]
        candidates = [[{"token": token, "probability": p} for token, p in mask] for mask in filled.candidates]
        return JSONResponse({"text": filled.text, "pieces": pieces, "candidates": candidates})

    async def probabilities(self, request: Request) -> Response:
        """The tokens of ``text``, with probability, rank and alternatives by each readout (or only by ``readout``)."""
        fields = Fields(await read_json(request, self.service.limits.body_bytes))
        text, top = fields.text("text"), fields.integer("top", 10, 1, MOST_ALTERNATIVES)
        model = self.service.model
        readouts, tokenizer = model.readouts, model.tokenizer
        if (wanted := fields.take("readout")) is not None:
            if wanted not in readouts:
                fields.problem("readout", f"must be one of {', '.join(readouts)}")
            readouts = (wanted,)
        fields.done()
        tokens = list(await asyncio.to_thread(encode_prompt, text, model, "text"))
        found = {}
        for readout in readouts:
            work = self.engine.compute(self.service.probabilities(tokens, readout, top))
            parts = await unless_disconnected(request, work)
            found[readout] = [_scored(one, tokenizer) for part in parts for one in part]
        named = [
            {"id": token, "name": token_name(tokenizer, token), "text": text}
            for token, text in zip(tokens, texts_of_tokens(tokenizer, tokens), strict=True)
        ]
        return JSONResponse({"tokens": named, "readouts": found})


def _scored(one: TokenProbability, tokenizer: Tokenizer) -> dict[str, Any]:
    alternatives = [
        {"token": token_name(tokenizer, token), "probability": math.exp(logprob)} for token, logprob in one.alternatives
    ]
    return {"probability": math.exp(one.logprob), "rank": one.rank, "alternatives": alternatives}
