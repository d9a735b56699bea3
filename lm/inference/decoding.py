"""One decoding step for several texts at once, with the keys and values of all earlier tokens in a cache.

On a CPU a step is bound by reading the weights and by the overhead of some two hundred small operations. So the step is
written out here with as few and as cheap calls as possible: matrices that share their input are concatenated and packed
for oneDNN, the weights of the norms and the scale of the scores are folded into them, the views of the cache are made
once for all layers, and rows with equally many keys share their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.inference.kv_cache import KVCache, WritingTokens
from lm.kernels import eager_on_cpu
from lm.kernels.matmul import has_onednn
from lm.model.threads import one_thread, others_want_cores
from lm.model.transformer import Block, Transformer, rotary_table

# Rotary angles are computed for blocks of this many positions, so that their bits never depend on the batch.
POSITIONS_AT_ONCE = 1024

# The layout for 16 rows is the best for one row, too: 1.5 times as fast as the layout that oneDNN chooses for one row.
PACKED_FOR_ROWS = 16

# While other programs want the cores, one thread decodes as many rows as these faster than several threads. From eight
# threads on, some bits of attention depend on their number.
FEW_ROWS, FEW_THREADS = 8, 4

Step = Callable[[list[int]], Tensor]


def decoder(model: Transformer, cache: KVCache) -> Step:
    """Return the function that reads a token of each of the first rows of ``cache`` and returns the next logits.

    The logits are (rows, vocabulary), float32, on the CPU; the caller may overwrite them.
    """
    weight = model.head_weight
    if eager_on_cpu(weight) and weight.dtype == torch.float32 and has_onednn():
        packed = PackedDecoder(model, cache)

        def packed_step(tokens: list[int]) -> Tensor:
            if len(tokens) > FEW_ROWS or not others_want_cores() or torch.get_num_threads() > FEW_THREADS:
                return packed.step(tokens)
            with one_thread():
                return packed.step(tokens)

        return packed_step

    def step(tokens: list[int]) -> Tensor:
        writing = WritingTokens(cache, len(tokens))
        inputs = torch.tensor(tokens, device=cache.stored.device)[:, None]
        hidden = model(inputs, writing.positions, writing.lo, writing.hi, writing)
        writing.done()
        return model.logits(hidden[:, 0]).cpu()

    return step


class PackedMatrix:
    """A matrix (outputs, inputs) in the layout that oneDNN reads fastest for few rows of input."""

    def __init__(self, weight: Tensor) -> None:
        self.inputs = weight.shape[1]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self._product: Any = torch.ops.mkldnn._linear_pointwise.default  # the lookup takes time

    def times(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` (rows, outputs) for x (rows, inputs)."""
        return self._product(x, self._weight, None, "none", [], "")


Matrix = TypeVar("Matrix", Tensor, PackedMatrix)


@dataclass(frozen=True)
class Matrices(Generic[Matrix]):
    """A block's matrices (outputs, inputs) with the linear factors around them folded in.

    ``head_weights`` (query and key heads, head width) are those of QK-norm, if any.
    """

    heads: Matrix  # queries, keys, values
    head_weights: Tensor | None
    output: Matrix
    inner: Matrix  # gate, if any, and up
    down: Matrix


@dataclass(frozen=True)
class _Run:
    """Adjacent rows with equally many tokens, and per layer the views of the cache that a step needs."""

    start: int
    end: int
    slots: tuple[Tensor, ...]  # for the new keys and values (rows, 2, key-value heads, head width)
    keys: tuple[Tensor, ...]  # including the new ones, (rows · key-value heads, head width, tokens)
    values: tuple[Tensor, ...]  # (rows · key-value heads, tokens, head width)


class PackedDecoder:
    """Decoding steps in float32 on a CPU. Holds a second copy of the matrices.

    A row's logits have the same bits in every batch: each product takes at least ``least_rows`` rows, from which on
    oneDNN gives a row the same bits whatever the other rows, and the rest is computed row by row.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._config, self._cache = model.config, cache
        with torch.inference_mode():
            self._embedding = model.embedding.weight.detach()
            self._layers = [_packed(folded(cast(Block, block))) for block in model.blocks]
            self._head = PackedMatrix(folded_head(model))
            self._rotations = torch.empty(0, 2, self._config.head_width)
            # A norm's factor to the root mean square and its learned weight are folded into the matrix after it.
            self._epsilon = torch.tensor(self._config.norm_epsilon * self._config.hidden_size)
            self._head_epsilon = torch.tensor(self._config.norm_epsilon * self._config.head_width)
            first = self._layers[0]
            kinds = [first.heads, first.output, first.inner, first.down, self._head]
            self.least_rows = least_rows_with_equal_bits(kinds, max(len(cache.lengths), PACKED_FOR_ROWS))

    def step(self, tokens: list[int]) -> Tensor:
        """Return logits (rows, vocabulary) after one more token of each of the first rows; ``lengths`` grow by one."""
        rows, cache, config = len(tokens), self._cache, self._config
        padding = [0] * (self.least_rows - rows)
        heads, kv_heads, width = config.num_heads, config.key_value_heads, config.head_width
        runs = _runs(cache.stored, cache.lengths[:rows])
        cos, sin = self._rotary(cache.lengths[:rows] + padding)
        x = self._embedding.index_select(0, torch.tensor(tokens + padding))
        for layer, matrices in enumerate(self._layers):
            qkv = matrices.heads.times(_normed(x, self._epsilon)).view(len(x), -1, width)
            qk = qkv.narrow(1, 0, heads + kv_heads)
            if matrices.head_weights is not None:
                qk.mul_(_inverse_norm(qk, self._head_epsilon)).mul_(matrices.head_weights)
            # (a, b) of each pair becomes (a cos - b sin, b cos + a sin); the halves of a head hold a and b.
            exchanged = qk.roll(width // 2, -1)
            qk.mul_(cos).addcmul_(exchanged, sin)
            x = matrices.output.times(_attend(qkv, runs, layer, heads, kv_heads)).add_(x)
            inner = matrices.inner.times(_normed(x, self._epsilon))
            if config.activation == "swiglu":
                gate, up = inner.chunk(2, 1)
                inner = F.silu(gate).mul_(up)
            else:
                inner.relu_().square_()
            x = matrices.down.times(inner).add_(x)
        for row in range(rows):
            cache.lengths[row] += 1
        logits = self._head.times(_normed(x, self._epsilon))[:rows]
        return logits.tanh_().mul_(config.logit_softcap) if config.logit_softcap else logits

    def _rotary(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Return cosines, and sines with the sign of their half, (rows, 1, head width), for some positions."""
        while len(self._rotations) <= max(positions):
            fresh = torch.arange(len(self._rotations), len(self._rotations) + POSITIONS_AT_ONCE)
            cos, sin = (each[:, 0] for each in rotary_table(fresh, self._config.head_width, self._config.rope_theta))
            fresh = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
            self._rotations = torch.cat((self._rotations, fresh))
        chosen = self._rotations.index_select(0, torch.tensor(positions))
        return chosen[:, :1], chosen[:, 1:]


def _runs(stored: Tensor, lengths: list[int]) -> list[_Run]:
    """Group the rows of ``stored``, which hold ``lengths`` tokens before this step, into runs of equal length."""
    capacity, runs, start = stored.shape[4], [], 0
    for length, run in groupby(lengths):
        end = start + sum(1 for _ in run)
        of_rows = stored[:, :, start:end]
        keys, values = of_rows[..., : min(length + 1, capacity), :].flatten(2, 3).unbind(1)
        slots = of_rows[..., length % capacity, :].transpose(1, 2)
        runs.append(_Run(start, end, slots.unbind(), keys.transpose(2, 3).unbind(), values.unbind()))
        start = end
    return runs


def _attend(qkv: Tensor, runs: list[_Run], layer: int, heads: int, kv_heads: int) -> Tensor:
    """Store each row's new keys and values, and return its attention output (padded rows, heads · width).

    ``qkv`` is (padded rows, heads + 2 · key-value heads, width). Each row and key-value head is a product on its own.
    """
    width = qkv.shape[2]
    parts = []
    for run in runs:
        count = run.end - run.start
        of_run = qkv if count == len(qkv) else qkv[run.start : run.end]
        run.slots[layer].copy_(of_run.narrow(1, heads, 2 * kv_heads).view(count, 2, kv_heads, width))
        queries = of_run.narrow(1, 0, heads).reshape(count * kv_heads, -1, width)
        weights = torch.bmm(queries, run.keys[layer]).softmax(-1)
        parts.append(torch.bmm(weights, run.values[layer]).view(count, -1))
    if runs[-1].end < len(qkv):
        parts.append(qkv.new_zeros(len(qkv) - runs[-1].end, heads * width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _normed(x: Tensor, epsilon: Tensor) -> Tensor:
    """Return x divided by its norm."""
    return x * _inverse_norm(x, epsilon)


def _inverse_norm(x: Tensor, epsilon: Tensor) -> Tensor:
    """Return 1 / sqrt(|x|² + epsilon) over the last dimension, which stays with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(epsilon).rsqrt_()


def folded(block: Block) -> Matrices[Tensor]:
    """Return a block's matrices with the weights of the norms and the scale of the scores multiplied into them."""
    attention, feed_forward = block.attention, block.feed_forward
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
    into = (feed_forward.gate, feed_forward.up) if feed_forward.gated else (feed_forward.up,)
    norm = block.feed_forward_norm.weight * root
    return Matrices(
        heads=torch.cat((query, key, value)),
        head_weights=head_weights,
        output=attention.output.weight.detach(),
        inner=torch.cat([matrix.weight * norm for matrix in into]),
        down=feed_forward.down.weight.detach(),
    )


def folded_head(model: Transformer) -> Tensor:
    """Return the head (vocabulary, hidden) with the last norm's weight and the logit softcap multiplied into it."""
    head = model.head_weight * model.norm.weight * model.config.hidden_size**0.5
    return head / model.config.logit_softcap if model.config.logit_softcap else head


def _packed(m: Matrices[Tensor]) -> Matrices[PackedMatrix]:
    heads, output, inner, down = map(PackedMatrix, (m.heads, m.output, m.inner, m.down))
    return Matrices(heads, m.head_weights, output, inner, down)


def least_rows_with_equal_bits(matrices: list[PackedMatrix], most: int) -> int:
    """Return the smallest number of rows from which on, up to ``most``, each row's product has the same bits.

    With many inputs oneDNN uses another kernel for one row than for several; other thresholds may exist elsewhere.
    """
    least = 1
    for matrix in matrices:
        x = torch.randn(most, matrix.inputs, generator=torch.Generator().manual_seed(0))
        whole = matrix.times(x)
        other = (rows for rows in range(most - 1, 0, -1) if not torch.equal(matrix.times(x[:rows]), whole[:rows]))
        least = max(least, next(other, 0) + 1)
    return least
