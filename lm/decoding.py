"""The next token of several texts at once: one step of the model, with the keys and values of all before in a cache.

On a CPU a step is bound by reading the weights, and by the time it takes to call some two hundred small operations. So
there it is written out here, with the fewest and cheapest calls: matrices that share their input lie side by side and
are packed for oneDNN, the norms' weights and the scale of the scores are multiplied into them beforehand, activations
and residual sums are computed by the products themselves, and rows with equally many keys share their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from lm.cache import KVCache, WritingTokens
from lm.kernels import eager_on_cpu
from lm.kernels.products import has_onednn
from lm.model import Block, Transformer, rotary_table

# Positions whose angles are computed at a time: the same ones together, so that their bits never depend on the batch.
POSITIONS_AT_ONCE = 1024

Step = Callable[[list[int]], Tensor]


def decoder(model: Transformer, cache: KVCache) -> Step:
    """The function that reads one token of each of the first rows of ``cache``, and returns the logits of the next ones
    (rows, vocabulary), float32, on the CPU; the caller may overwrite them."""
    weight = model.embedding.weight
    if eager_on_cpu(weight) and weight.dtype == torch.float32 and has_onednn():
        return PackedDecoder(model, cache).step
    return lambda tokens: _step_of_the_model(model, cache, tokens)


def _step_of_the_model(model: Transformer, cache: KVCache, tokens: list[int]) -> Tensor:
    writing = WritingTokens(cache, len(tokens))
    inputs = torch.tensor(tokens, device=cache.keys.device)[:, None]
    hidden = model(inputs, writing.positions, writing.lo, writing.hi, writing)
    writing.done()
    return model.logits(hidden[:, 0]).cpu()


class Packed:
    """A matrix (outputs, inputs) in the order in which oneDNN's product reads it fastest, for few rows of input."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.inputs = weight.shape[1]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self._product: Any = torch.ops.mkldnn._linear_pointwise.default  # looked up once: that takes time, too
        self._with_other: Any = torch.ops.mkldnn._linear_pointwise.binary

    def times(self, x: Tensor, activation: str = "none") -> Tensor:
        """``activation(x @ weight.T)`` (rows, outputs), for x (rows, inputs); "swish" is SiLU."""
        return self._product(x, self._weight, None, activation, [], "")

    def times_and(self, x: Tensor, operation: str, other: Tensor) -> Tensor:
        """``x @ weight.T`` plus ("add") or times ("mul") ``other`` (rows, outputs), which may be overwritten."""
        return self._with_other(x, other, self._weight, None, operation)


@dataclass(frozen=True)
class _Layer:
    """A block's matrices. ``head_weights`` (query and key heads, head width) are those of QK-norm, if there is one."""

    heads: Packed  # queries, keys, values
    head_weights: Tensor | None
    output: Packed
    gate: Packed | None
    up: Packed
    down: Packed


class PackedDecoder:
    """Steps in float32 on a CPU.

    A row's logits are the same bits in every batch: each product is that of at least ``least_rows`` rows, the number
    from which on oneDNN was seen to give a row the same bits among any others, and the rest is computed row by row.
    Holds a second copy of the matrices.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._config, self._cache = model.config, cache
        rows = len(cache.lengths)
        with torch.inference_mode():
            self._embedding = model.embedding.weight.detach()
            self._layers = [_packed(cast(Block, block), rows) for block in model.blocks]
            cap = self._config.logit_softcap
            head = model.head_weight * model.norm.weight * self._config.hidden_size**0.5
            self._head = Packed(head / cap if cap else head, rows)
            self._turns = torch.empty(0, 2, self._config.head_width)
            self.least_rows = least_rows_with_equal_bits([self._layers[0].down, self._layers[0].up, self._head], rows)

    def step(self, tokens: list[int]) -> Tensor:
        """Logits (rows, vocabulary) after one more token of each of the first rows; ``lengths`` grow by one."""
        rows, cache, config = len(tokens), self._cache, self._config
        padded = max(rows, self.least_rows)
        lengths = cache.lengths[:rows]
        slots = torch.tensor([length % cache.capacity for length in lengths])
        places = torch.arange(rows)
        filled = [min(length + 1, cache.capacity) for length in lengths]
        cos, sin = self._rotary(lengths + [0] * (padded - rows))
        x = self._embedding.index_select(0, torch.tensor(tokens + [0] * (padded - rows)))
        heads, kv_heads, width = config.num_heads, config.key_value_heads, config.head_width
        for layer, matrices in enumerate(self._layers):
            qkv = matrices.heads.times(self._normed(x)).view(padded, -1, width)
            qk = qkv[:, : heads + kv_heads]
            if matrices.head_weights is not None:
                qk = qk * _inverse_norm(qk, config.norm_epsilon * width) * matrices.head_weights
            # (a, b) of each pair becomes (a cos - b sin, b cos + a sin); the halves of a head hold a and b.
            halves = qk.unflatten(2, (2, width // 2)).flip(2).flatten(2)
            qk = torch.addcmul(qk * cos, halves, sin)
            keys, values = cache.keys[layer], cache.values[layer]
            keys[places, :, slots] = qk[:rows, heads:]
            values[places, :, slots] = qkv[:rows, heads + kv_heads :]
            seen = self._attend(qk[:, :heads], keys, values, filled)
            x = matrices.output.times_and(seen, "add", x)
            y = self._normed(x)
            if matrices.gate is not None:
                inner = matrices.up.times_and(y, "mul", matrices.gate.times(y, "swish"))
            else:
                inner = matrices.up.times(y, "relu").square_()
            x = matrices.down.times_and(inner, "add", x)
        for row in range(rows):
            cache.lengths[row] += 1
        logits = self._head.times(self._normed(x), "tanh" if config.logit_softcap else "none")[:rows]
        return logits.mul_(config.logit_softcap) if config.logit_softcap else logits

    def _normed(self, x: Tensor) -> Tensor:
        """x over its norm; the factor to its root mean square, and the learned weight, are in the next matrix."""
        return x * _inverse_norm(x, self._config.norm_epsilon * self._config.hidden_size)

    def _rotary(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the sign of the half, (rows, 1, head width), of some positions."""
        while len(self._turns) <= max(positions):
            fresh = torch.arange(len(self._turns), len(self._turns) + POSITIONS_AT_ONCE)
            cos, sin = (each[:, 0] for each in rotary_table(fresh, self._config.head_width, self._config.rope_theta))
            fresh = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
            self._turns = torch.cat((self._turns, fresh))
        chosen = self._turns.index_select(0, torch.tensor(positions))
        return chosen[:, :1], chosen[:, 1:]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, filled: list[int]) -> Tensor:
        """What each row's queries (padded rows, heads, width) see of its own keys, (padded rows, heads · width).

        Neighbours with equally many keys go together: a product for each row and key-value head, on its own.
        """
        kv_heads, _, width = keys.shape[1:]
        group = q.shape[1] // kv_heads
        out = q.new_zeros(len(q), q.shape[1] * width)
        start = 0
        for count, run in groupby(filled):
            end = start + len(list(run))
            queries = q[start:end].reshape(-1, group, width)
            k, v = (stored[start:end].flatten(0, 1)[:, :count] for stored in (keys, values))
            weights = torch.bmm(queries, k.transpose(1, 2)).softmax(-1)
            torch.bmm(weights, v, out=out[start:end].view(-1, group, width))
            start = end
        return out


def _inverse_norm(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(|x|² + epsilon) of the last dimension, which stays with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(epsilon).rsqrt_()


def _packed(block: Block, rows: int) -> _Layer:
    attention, inner = block.attention, block.feed_forward
    root, width = block.attention_norm.weight.numel() ** 0.5, attention.head_width
    query, key, value = (
        part.weight * block.attention_norm.weight * root for part in (attention.query, attention.key, attention.value)
    )
    head_weights = None
    if attention.query_norm is None or attention.key_norm is None:
        query = query * width**-0.5  # the scale of the scores
    else:
        query_weight, key_weight = attention.query_norm.weight, attention.key_norm.weight * width**0.5
        per_head = ((query_weight, query), (key_weight, key))
        head_weights = torch.cat([weight.expand(len(matrix) // width, width) for weight, matrix in per_head])
    norm = block.feed_forward_norm.weight * root
    return _Layer(
        heads=Packed(torch.cat((query, key, value)), rows),
        head_weights=head_weights,
        output=Packed(attention.output.weight, rows),
        gate=Packed(inner.gate.weight * norm, rows) if inner.gated else None,
        up=Packed(inner.up.weight * norm, rows),
        down=Packed(inner.down.weight, rows),
    )


def least_rows_with_equal_bits(matrices: list[Packed], most: int) -> int:
    """The smallest number of rows from which on, up to ``most``, each row's product is the same bits as among ``most``.

    oneDNN takes another kernel for one row than for several where the inputs are many; others may differ elsewhere.
    """
    least = 1
    for matrix in matrices:
        x = torch.randn(most, matrix.inputs, generator=torch.Generator().manual_seed(0))
        whole = matrix.times(x)
        other = (rows for rows in range(most - 1, 0, -1) if not torch.equal(matrix.times(x[:rows]), whole[:rows]))
        least = max(least, next(other, 0) + 1)
    return least
