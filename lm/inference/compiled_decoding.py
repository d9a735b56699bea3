"""The step of ``lm.inference.decoding`` for one text, compiled by ``torch.compile`` for this machine and this model.

The compiler generates a matrix product for one row per shape, fused with what follows, and one C++ function that calls
them; what remains is the time to read the weights. Compiling takes some seconds and needs a C++ compiler.
"""

from __future__ import annotations

import time
from typing import cast

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from lm.inference.cuda_graph import capture
from lm.inference.decoding import Step, decoder, folded, folded_head
from lm.inference.graph_decoding import GraphDecoder
from lm.inference.kv_cache import KVCache
from lm.kernels import eager_on_cpu
from lm.model.transformer import Block, Transformer, rotary_table

OPTIONS: dict[str, str | int | bool] = {
    "cpp_wrapper": True,
    "freezing": True,  # the weights are constants, packed once
    "max_autotune": True,
    # Only these products: choosing the fastest of several would make the bits depend on the load of the machine.
    "max_autotune_gemm_backends": "CPP",
}


def compiled_decoder(model: Transformer, cache: KVCache) -> tuple[Step, str]:
    """Return a compiled ``decoding.decoder`` and a note on how long compiling took; if it fails, ``decoder`` and why.

    On a CPU, rows are computed one after the other, so that each has the same bits alone and among others; for many
    rows, ``decoder`` is faster. On a GPU, a step is recorded as a CUDA graph, and its logits stay on the device.
    """
    weight = model.head_weight
    if not weight.is_cuda and (not eager_on_cpu(weight) or weight.dtype != torch.float32 or cache.capacity < 2):
        return decoder(model, cache), "the step is not compiled: only a GPU, or float32 on a CPU, is supported"
    start = time.perf_counter()
    try:
        step = GraphDecoder(model, cache, capture).step if weight.is_cuda else CompiledDecoder(model, cache).step
    except Exception as problem:  # torch.compile, Triton and a capture have errors of many kinds
        reason = str(problem).strip().partition("\n")[0]
        return decoder(model, cache), f"the step could not be compiled and runs uncompiled: {reason}"
    return step, f"compiled the step in {time.perf_counter() - start:.1f} s"


class CompiledDecoder:
    """Decoding steps in float32 on a CPU, one row at a time. Holds a second copy of the matrices."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._cache = cache
        # Per row: keys and values, each a tensor (key-value heads, capacity, head width) per layer.
        self._rows = [
            tuple(list(kind[:, row].unbind()) for kind in cache.stored.unbind(1)) for row in range(len(cache.lengths))
        ]
        self._seen = torch.zeros(cache.capacity)
        self._first = torch.tensor([0.0, float("-inf")])
        # torch.compile checks for freezing before it reads its own options, so they are set globally meanwhile.
        with torch.inference_mode(), torch._inductor.config.patch(OPTIONS):
            self._graph = torch.compile(_OneToken(model), fullgraph=True)
            self._logits(0, 0, warm_up=True)

    def step(self, tokens: list[int]) -> Tensor:
        """Return logits (rows, vocabulary) after one more token of each of the first rows; ``lengths`` grow by one."""
        logits = [self._logits(row, token) for row, token in enumerate(tokens)]
        for row in range(len(tokens)):
            self._cache.lengths[row] += 1
        return torch.cat(logits)

    def _logits(self, row: int, token: int, *, warm_up: bool = False) -> Tensor:
        length = self._cache.lengths[row]
        count = min(length + 1, self._cache.capacity)
        # torch.compile treats a size of 1 as a constant, so the first token gets a second slot, which is masked.
        seen = self._first if count == 1 else self._seen[:count]
        if warm_up:
            torch._dynamo.mark_dynamic(seen, 0, min=2, max=self._cache.capacity)
        numbers = (torch.tensor([number]) for number in (token, length, length % self._cache.capacity))
        return self._graph(*numbers, seen, *self._rows[row])


class _OneToken(nn.Module):
    """The formulas of ``PackedDecoder.step`` for one row, in a form that ``torch.compile`` accepts."""

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
        """Return logits (1, vocabulary) after ``token`` (1,) at ``position`` (1,), stored in ``slot`` (1,).

        It attends to as many slots as ``seen`` has numbers; these are added to the scores.
        """
        config, count = self._config, seen.shape[0]
        heads, kv_heads, width = config.num_heads, config.key_value_heads, config.head_width
        cos, sin = (each[0] for each in rotary_table(position, width, config.rope_theta))  # (1, width / 2)
        # Indices, because a slice of the whole length would be a special case and be compiled again.
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
        """Return x divided by its norm; the other factors of the norm are in the next matrix."""
        epsilon = self._config.norm_epsilon * self._config.hidden_size
        return x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt()


def _constant(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad=False)
