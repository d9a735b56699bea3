"""The whole transformer: stem (token embedding) -> trunk (blocks) -> head (final norm, logits or loss).

Llama's shape (Touvron et al. 2023): RMSNorm before each half of a block, rotary positions, grouped-query attention, a
gated feed-forward, no biases. Each batch says which keys a query may see, so the same weights read a text causally
(GPT) or bidirectionally (BERT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm import kernels
from lm.config.model_settings import ModelConfig


class Readable(Protocol):
    """What a pass reads of a batch (``lm.data.batch.Batch``); all (rows, T)."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def lo(self) -> Tensor: ...
    @property
    def hi(self) -> Tensor: ...


Pair = tuple[Tensor, Tensor]


class Cache(Protocol):
    """Keeps the keys and values of earlier tokens between passes (``lm.inference.kv_cache``)."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Store a layer's new keys and values (B, T, Hkv, D); return all that the intervals count, (B, Tk, Hkv, D)."""


class RMSNorm(nn.Module):
    """Divide by the root mean square, times a learned weight (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.epsilon)


def rotary_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """The angle by which each pair of a head's numbers turns from one position to the next, float32 (width / 2,)."""
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def rotary_table(positions: Tensor, width: int, theta: float) -> Pair:
    """Cosines and sines (rows, T, 1, width / 2) of the rotary embedding (Su et al. 2021, eq. 34).

    ``positions`` is (rows, T), or (rows, T, 2) for the row and column of an image's patches: the frequencies with an
    even number then turn with the row, the others with the column, as in Pixtral (Agrawal et al. 2024). In float32, as
    in other libraries' models: exact to 2e-5 at position 2,000, to 1e-3 at 100,000.
    """
    frequencies = rotary_frequencies(width, theta, positions.device)
    if positions.ndim == 3:
        by_axis = [positions[..., axis, None, None] * frequencies[axis::2] for axis in range(2)]
        angles = torch.cat(by_axis, dim=-1)
    else:
        angles = positions[..., None, None] * frequencies
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the keys that the intervals let each query see."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_width, config.key_value_heads * config.head_width
        self.head_width = config.head_width
        self.query = nn.Linear(config.hidden_size, width, bias=False)
        self.key = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.value = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.output = nn.Linear(width, config.hidden_size, bias=False)
        self.query_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: Pair, intervals: Pair, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.heads(x, rotary)  # (B, T, H, D) and twice (B, T, Hkv, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out, _ = kernels.attention(q, k, v, *intervals)
        return kernels.linear(out.flatten(2), self.output.weight)

    def heads(self, x: Tensor, rotary: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: (B, T, H, D) and twice (B, T, Hkv, D)."""
        if torch.is_grad_enabled() and self.query_norm is None and kernels.eager_on_cpu(x):
            return kernels.qkv_projection(x, self.query.weight, self.key.weight, self.value.weight, *rotary)
        q, k, v = (f(x).unflatten(-1, (-1, self.head_width)) for f in (self.query, self.key, self.value))
        if kernels.eager_on_cpu(x):  # under autocast too: attention on a CPU gains nothing by fewer bits
            q, k, v = (part.to(x.dtype) for part in (q, k, v))
        q, k = (
            kernels.rotary(x, *rotary) if norm is None else kernels.rotary(x, *rotary, norm.weight, norm.epsilon)
            for x, norm in ((q, self.query_norm), (k, self.key_norm))
        )
        return q, k, v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) or squared ReLU (So et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        if self.gated:
            self.gate = nn.Linear(config.hidden_size, config.feed_forward_width, bias=False)
        self.up = nn.Linear(config.hidden_size, config.feed_forward_width, bias=False)
        self.down = nn.Linear(config.feed_forward_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return kernels.swiglu(x, self.gate.weight, self.up.weight, self.down.weight)
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention, then the feed-forward, each added to the residual stream x (B, T, hidden)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Pair, intervals: Pair, cache: Cache | None, layer: int) -> Tensor:
        if cache is None and self.is_plain and kernels.eager_on_cpu(x) and kernels.has_data(x):
            return self.in_two_operations(x, rotary, intervals)
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, intervals, cache, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    @property
    def is_plain(self) -> bool:
        """Whether this pass computes gradients, without QK-norm, dropout or an ungated feed-forward."""
        dropout = self.training and self.dropout.p > 0
        return torch.is_grad_enabled() and not dropout and self.attention.query_norm is None and self.feed_forward.gated

    def in_two_operations(self, x: Tensor, rotary: Pair, intervals: Pair) -> Tensor:
        """The same result, bit for bit, with less work around the matrix products."""
        a, norm = self.attention, self.attention_norm
        projections = a.query.weight, a.key.weight, a.value.weight, a.output.weight
        x = kernels.attention_sublayer(x, norm.weight, norm.epsilon, projections, rotary, intervals)
        f, norm = self.feed_forward, self.feed_forward_norm
        return kernels.feed_forward_sublayer(x, norm.weight, norm.epsilon, f.gate.weight, f.up.weight, f.down.weight)


class Trunk(nn.ModuleList):
    """The blocks, which know neither words nor patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Block(config) for _ in range(config.num_layers))
        self.config = config

    def forward(self, x: Tensor, positions: Tensor, lo: Tensor, hi: Tensor, cache: Cache | None) -> Tensor:
        """Hidden states (rows, T, hidden) of x, what the stem made of the inputs; the rest as of ``Transformer``.

        ``positions`` may have two axes, (rows, T, 2), as of ``rotary_table``.
        """
        rotary = rotary_table(positions, self.config.head_width, self.config.rope_theta)
        x = F.dropout(x, self.config.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):  # which leaves it to the stem: float32 for text, not for images
            rounded = self.training and self.config.residual_precision == "bfloat16"
            x = x.to(torch.get_autocast_dtype(x.device.type) if rounded else torch.float32)
        for layer, block in enumerate(self):
            x = block(x, rotary, (lo, hi), cache, layer)
        return x

    def flops_per_token(self, context_length: int) -> float:
        """As of ``Transformer.flops_per_token``, without the head."""
        matrices = sum(weight.numel() for weight in self.parameters() if weight.ndim == 2)
        config = self.config
        return 6.0 * matrices + 12 * config.num_layers * config.num_heads * config.head_width * context_length


def initialize(
    model: nn.Module, seed: int, *, embedding_std: float | None = None, identity: bool = True, output_init: float = 0.0
) -> None:
    """Draw all weights from ``seed``: the same ones on every device and for every number of threads.

    Matrices and convolutions are normal with variance 1 / (3 · inputs), or those of the embedding and its head with
    ``embedding_std``, if it is given. Those that write into the residual stream are zero, so that every block starts as
    the identity (Goyal et al. 2017; Zhang et al. 2019, Fixup), unless ``identity`` is False, or ``output_init`` gives
    their standard deviation as a multiple of 1 / sqrt(hidden size).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        ends_half = identity and name.endswith((".output.weight", ".down.weight"))
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif ends_half and not output_init:
            nn.init.zeros_(parameter)
        else:
            scaled = (3 * parameter[0].numel()) ** -0.5
            std = scaled if embedding_std is None or name.startswith(("blocks.", "projector.")) else embedding_std
            if ends_half:  # (hidden size, inputs)
                std = output_init * len(parameter) ** -0.5
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class Transformer(nn.Module):
    """Token ids in, hidden states out; ``logits`` and ``loss`` are the one head that all of text's objectives share.

    ``projector`` is the head of an objective that compares views, which only its training uses.
    """

    def __init__(self, config: ModelConfig, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        # Not drawn here, which on the meta device would import torch._dynamo (2 s), but initialized or loaded later.
        self.embedding = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.hidden_size), freeze=False)
        self.blocks = Trunk(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.projector = projector
        self._compiled: Callable[..., Tensor] | None = None

    def initialize(self, seed: int, *, output_init: float = 0.0) -> Transformer:
        """Draw all weights from ``seed``, as ``initialize`` does, the embedding with a standard deviation of 0.02."""
        initialize(self, seed, embedding_std=0.02, output_init=output_init)
        return self

    def forward(self, inputs: Tensor, positions: Tensor, lo: Tensor, hi: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states (rows, T, hidden) of ``inputs``, int64 (rows, T).

        ``positions`` (rows, T) are the rotary positions; ``lo`` and ``hi`` the key intervals, which count the
        keys that the ``cache`` returns, or without one those of ``inputs``.
        """
        through = self._compiled if self._compiled and self.training else self._through_trunk
        return through(self.embedding(inputs), positions, lo, hi, cache)

    def read(self, batch: Readable) -> Tensor:
        """Hidden states (rows, T, hidden) of a batch that is on the model's device."""
        hidden: Tensor = self(batch.inputs, batch.positions, batch.lo, batch.hi)
        return hidden

    def compile_training(self) -> None:
        """Run training passes through ``torch.compile``, at the first one of each shape; others stay eager.

        The embedding stays out: on a GPU the compiler adds up its gradient in an order that changes from run to run.
        """
        self._compiled = torch.compile(self._through_trunk, fullgraph=True)

    def _through_trunk(self, x: Tensor, positions: Tensor, lo: Tensor, hi: Tensor, cache: Cache | None) -> Tensor:
        return self.norm(self.blocks(x, positions, lo, hi, cache))

    @property
    def head_weight(self) -> Tensor:
        """The matrix (vocab_size, hidden) that turns hidden states into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (…, vocab_size) of hidden states (…, hidden). For generation; training uses ``loss``."""
        return self.softcapped((hidden @ self.head_weight.T).float())

    def softcapped(self, logits: Tensor) -> Tensor:
        """``logits`` limited by the model's softcap, if it has one."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, hidden: Tensor, targets: Tensor, loss_weights: Tensor, predicted: int | None = None) -> Tensor:
        """Weighted sum of cross-entropies, in nats; targets and weights (rows, T), -100 where nothing is predicted.

        ``predicted`` is as of ``kernels.linear_cross_entropy``.
        """
        hidden, targets, loss_weights = hidden.flatten(0, 1), targets.flatten(), loss_weights.flatten()
        softcap = self.config.logit_softcap
        return kernels.linear_cross_entropy(
            hidden, self.head_weight, targets, loss_weights=loss_weights, softcap=softcap, predicted=predicted
        )

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The scores of some ``tokens`` (…, n) alone, float32 (…, n), of hidden states (…, hidden)."""
        logits = (F.embedding(tokens, self.head_weight).float() * hidden.float().unsqueeze(-2)).sum(-1)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, in the embedding (and untied head), and in the blocks."""
        embedding = self.embedding.weight.numel() * (1 if self.head is None else 2)
        total, blocks = (sum(p.numel() for p in part.parameters()) for part in (self, self.blocks))
        return {"total": total, "embedding": embedding, "blocks": blocks}

    def flops_per_token(self, context_length: int) -> float:
        """Floating-point operations of one training token, by the convention of Chowdhery et al. 2022 (PaLM, app. B).

        Each weight of a matrix product counts 6: a multiplication and an addition forward, twice that backward. Each
        pair of a query and a key counts 12 for each number of its heads, all pairs of a row together: that a causal
        query sees half of the keys on average is not taken into account. What attention computes again in the
        backward pass, norms, rotary positions and activations are not counted.
        """
        return 6.0 * self.head_weight.numel() + self.blocks.flops_per_token(context_length)

    def describe(self) -> str:
        """One line: what this model is."""
        c, counts = self.config, self.parameter_counts()
        return (
            f"{counts['total'] / 1e6:.2f}M parameters ({counts['embedding'] / 1e6:.2f}M embedding): "
            f"{c.shape}, vocabulary {c.vocab_size:,}"
        )
