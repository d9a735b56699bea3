"""The step of ``lm.inference.decoding`` for one text, compiled by ``torch.compile`` for this machine and this model.

What takes time is left then: reading the weights. The compiler writes a product for one row of each shape, with what
comes after it, and one function in C++ that calls them. Compiling takes some seconds and a C++ compiler.
"""

from __future__ import annotations

import time
from typing import cast

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from lm.inference.decoding import Step, decoder, folded, folded_head
from lm.inference.kv_cache import KVCache
from lm.kernels import eager_on_cpu
from lm.model.transformer import Block, Transformer, rotary_table

OPTIONS: dict[str, str | int | bool] = {
    "cpp_wrapper": True,
    "freezing": True,  # the weights are constants, packed once
    "max_autotune": True,
    # Only these products: where the fastest of several is taken, the bits depend on how busy the machine was.
    "max_autotune_gemm_backends": "CPP",
}


def compiled_decoder(model: Transformer, cache: KVCache) -> tuple[Step, str]:
    """Like ``decoding.decoder``, compiled, and a sentence that says how long that took; where it cannot be, what
    ``decoder`` gives, and why.

    Rows are computed one after the other, so that each has the same bits alone and beside others; for many rows,
    ``decoder`` is the faster one.
    """
    weight = model.embedding.weight
    if not eager_on_cpu(weight) or weight.dtype != torch.float32 or cache.capacity < 2:
        return decoder(model, cache), "only steps in float32 on a CPU are compiled: these are not"
    start = time.perf_counter()
    try:
        step = CompiledDecoder(model, cache).step
    except RuntimeError as problem:  # all that torch.compile raises
        reason = str(problem).strip().partition("\n")[0]
        return decoder(model, cache), f"the step could not be compiled, and is computed without: {reason}"
    return step, f"compiled the step in {time.perf_counter() - start:.1f} s"


class CompiledDecoder:
    """Steps in float32 on a CPU, of one row at a time. Holds a second copy of the matrices."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._cache = cache
        # For each row its keys and values, a tensor (key-value heads, capacity, head width) for each layer.
        self._rows = [
            tuple(list(kind[:, row].unbind()) for kind in cache.stored.unbind(1)) for row in range(len(cache.lengths))
        ]
        self._seen = torch.zeros(cache.capacity)
        self._first = torch.tensor([0.0, float("-inf")])
        # Freezing is looked for before the options of torch.compile are, so these are set for the time of compiling.
        with torch.inference_mode(), torch._inductor.config.patch(OPTIONS):
            self._graph = torch.compile(_OneToken(model), fullgraph=True)
            self._logits(0, 0, warm_up=True)

    def step(self, tokens: list[int]) -> Tensor:
        """Logits (rows, vocabulary) after one more token of each of the first rows; ``lengths`` grow by one."""
        logits = [self._logits(row, token) for row, token in enumerate(tokens)]
        for row in range(len(tokens)):
            self._cache.lengths[row] += 1
        return torch.cat(logits)

    def _logits(self, row: int, token: int, *, warm_up: bool = False) -> Tensor:
        length = self._cache.lengths[row]
        count = min(length + 1, self._cache.capacity)
        # torch.compile takes a size of 1 for a constant, so the first token looks at a second place, and sees nothing.
        seen = self._first if count == 1 else self._seen[:count]
        if warm_up:
            torch._dynamo.mark_dynamic(seen, 0, min=2, max=self._cache.capacity)
        keys, values = self._rows[row]
        return self._graph(
            torch.tensor([token]),
            torch.tensor([length]),
            torch.tensor([length % self._cache.capacity]),
            seen,
            keys,
            values,
        )


class _OneToken(nn.Module):
    """A step of one row, as ``torch.compile`` takes it: the formulas of ``PackedDecoder.step``."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self._config = model.config
        blocks = [folded(cast(Block, block)) for block in model.blocks]
        self.embedding = _constant(model.embedding.weight)
        self.heads = nn.ParameterList(_constant(each.heads) for each in blocks)
        self.output = nn.ParameterList(_constant(each.output) for each in blocks)
        self.inner = nn.ParameterList(_constant(each.inner) for each in blocks)
        self.down = nn.ParameterList(_constant(each.down) for each in blocks)
        weights = [each.head_weights for each in blocks if each.head_weights is not None]
        self.head_weights = nn.ParameterList(_constant(each) for each in weights)
        self.head = _constant(folded_head(model))

    def forward(
        self, token: Tensor, position: Tensor, slot: Tensor, seen: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Logits (1, vocabulary) of ``token`` (1,) at ``position`` (1,), whose keys and values go into ``slot`` (1,).

        It sees the first slots, one for each number of ``seen``, which is added to the scores.
        """
        config, count = self._config, seen.shape[0]
        heads, kv_heads, width = config.num_heads, config.key_value_heads, config.head_width
        cos, sin = (each[0] for each in rotary_table(position, width, config.rope_theta))  # (1, width / 2)
        # A slice to ``count`` would be another case where it is the whole, and be compiled again there.
        slots = torch.arange(count)
        x = F.embedding(token, self.embedding)
        for layer in range(config.num_layers):
            qkv = F.linear(self._normed(x), self.heads[layer]).view(-1, width)
            qk, v = qkv.split((heads + kv_heads, kv_heads))
            if config.qk_norm:
                norm = (qk.square().sum(-1, keepdim=True) + config.norm_epsilon * width).rsqrt()
                qk = qk * norm * self.head_weights[layer]
            a, b = qk.chunk(2, -1)
            q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).split((heads, kv_heads))
            keys[layer].index_copy_(1, slot, k[:, None])
            values[layer].index_copy_(1, slot, v[:, None])
            scores = (q.view(kv_heads, -1, 1, width) * keys[layer][:, None, slots]).sum(-1) + seen
            attended = (scores.softmax(-1)[..., None] * values[layer][:, None, slots]).sum(2).view(1, -1)
            x = x + F.linear(attended, self.output[layer])
            inner = F.linear(self._normed(x), self.inner[layer])
            if config.activation == "swiglu":
                gate, up = inner.chunk(2, 1)
                inner = F.silu(gate) * up
            else:
                inner = inner.relu().square()
            x = x + F.linear(inner, self.down[layer])
        logits = F.linear(self._normed(x), self.head)
        return logits.tanh() * config.logit_softcap if config.logit_softcap else logits

    def _normed(self, x: Tensor) -> Tensor:
        """x over its norm; the factor to its root mean square, and the learned weight, are in the next matrix."""
        epsilon = self._config.norm_epsilon * self._config.hidden_size
        return x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt()


def _constant(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad=False)
