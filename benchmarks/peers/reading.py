"""Any peer's model as a ``Transformer``, so that Kindling's evaluation measures all in the same way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.peer import OtherPeer
from lm.config.settings import Config
from lm.model.transformer import Readable, Transformer

TEXTS = 64  # in one pass of the peer's model


class PeerModel(Transformer):
    """Reads the documents of a row one by one, as texts of their own, and puts their states back in their places.

    Only what evaluation and a task's head use of a ``Transformer`` is there.
    """

    def __init__(self, peer: OtherPeer, model: Any, config: Config) -> None:
        nn.Module.__init__(self)
        self.peer, self.model, self.config = peer, model, config.model
        self.blocks, self.head = (), None  # type: ignore[assignment]

    def read(self, batch: Readable) -> Tensor:
        """States (rows, T, width) of a batch whose rows are all causal or all bidirectional."""
        place = torch.arange(batch.inputs.shape[1]).expand_as(batch.inputs)
        used = batch.hi > batch.lo
        causal = bool((batch.hi == place + 1)[used].all())
        begins = used & (batch.lo == place)
        text = begins[used].cumsum(0) - 1  # of each used position
        within = (place - batch.lo)[used].long()
        lengths = torch.bincount(text)
        order = torch.argsort(lengths)
        tokens = torch.zeros(len(lengths), max(2, int(lengths.max())), dtype=torch.long)
        tokens[text, within] = batch.inputs[used]
        states: Tensor | None = None
        for some in order.split(TEXTS):
            longest = max(2, int(lengths[some].max()))
            part = self.peer.states(self.model, tokens[some, :longest], lengths[some], causal)
            if states is None:
                states = part.new_zeros(*tokens.shape, part.shape[-1])
            states[some, :longest] = part
        assert states is not None
        out = states.new_zeros(*batch.inputs.shape, states.shape[-1])
        out[used] = states[text, within]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return self.peer.logits(self.model, hidden)[..., : self.config.vocab_size].float()

    def loss(self, hidden: Tensor, targets: Tensor, loss_weights: Tensor, predicted: int | None = None) -> Tensor:
        there = targets >= 0
        nats = F.cross_entropy(self.logits(hidden[there]), targets[there], reduction="none")
        return (nats * loss_weights[there]).sum()
