"""Models of transformers, as its examples run_clm and run_mlm train them.

Blocks of adjacent tokens, in another order each epoch; AdamW (0.9, 0.95), decay 0.1, clipping at 1, linear fall after
5 % of warmup; ``--bf16`` where the CPU multiplies bfloat16. Masked models predict 30 % of the tokens, of which 80 % are
masked and 10 % random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.peer import Clock, OtherPeer
from benchmarks.written_run import written_run
from lm.config.settings import Config
from lm.export.huggingface import export_huggingface
from lm.model.transformer import Transformer

WARMUP, DECAY, BETAS, CLIP = 0.05, 0.1, (0.9, 0.95), 1.0
MASK_RATE, MASKED, RANDOM = 0.3, 0.8, 0.1  # of the tokens; of those that are predicted


class Stock(OtherPeer):
    """A class of transformers in the shape of the recipe."""

    rates = (0.001, 0.003, 0.006)

    @property
    def shaped(self) -> Config:
        """The settings of a run with the peer's objective and vocabulary."""
        return self.config.replace(objective=self.objective, vocab_size=self.vocab_size)

    def new_model(self) -> Any:
        """The model with random weights."""
        import transformers

        with tempfile.TemporaryDirectory() as name:
            folder, config = Path(name), self.shaped
            weights = Transformer(config.model).initialize(0).state_dict()
            run = written_run(folder / "random", self.corpora.processor, config, weights)
            export_huggingface(run, folder / "peer", run.newest(), self.objective)
            auto = transformers.AutoModelForMaskedLM if self.masks else transformers.AutoModelForCausalLM
            return auto.from_config(transformers.AutoConfig.from_pretrained(folder / "peer"))

    @property
    def masks(self) -> bool:
        return self.objective == "masked_token"

    def train(self, rate: float, seed: int, steps: int) -> tuple[Any, list[float]]:
        stream, tokenizer = self.corpora.split("train"), self.corpora.processor
        torch.manual_seed(seed)
        model, draw = self.new_model().train(), torch.Generator().manual_seed(seed)
        batches = blocks(stream.read(0, stream.tokens).astype(np.int64), self.config, seed)
        optimizer = torch.optim.AdamW(model.parameters(), rate, BETAS, weight_decay=DECAY, fused=True)
        clock = Clock()
        for step in range(steps):
            inputs = labels = next(batches)
            if self.masks:
                inputs, labels = masked(inputs, tokenizer.mask_id, tokenizer.vocab_size, draw)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rate)
            with self.autocast():
                loss = model(input_ids=inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.step()
        return model, clock.times

    def states(self, model: Any, tokens: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        seen = torch.arange(tokens.shape[1]) < lengths[:, None]
        states: Tensor = model.base_model(input_ids=tokens, attention_mask=seen.long()).last_hidden_state
        return states

    def logits(self, model: Any, states: Tensor) -> Tensor:
        scores: Tensor = model.lm_head(states)
        return scores


class Llama(Stock):
    objective = "next_token"


class EuroBert(Stock):
    objective = "masked_token"


class ModernBert(Stock):
    objective = "masked_token"

    def new_model(self) -> Any:
        import transformers

        shape = self.shaped.model
        none: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        settings = transformers.ModernBertConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.feed_forward_width,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            max_position_embeddings=self.config.data.context_length + 1, pad_token_id=0, **none,
        )  # fmt: skip
        return transformers.ModernBertForMaskedLM(settings)

    def logits(self, model: Any, states: Tensor) -> Tensor:
        scores: Tensor = model.decoder(model.head(states))
        return scores


def blocks(tokens: NDArray[np.int64], config: Config, seed: int) -> Iterator[Tensor]:
    """Batches (rows, context) of adjacent blocks, shuffled in each epoch; the incomplete last block is left out."""
    context, rows = config.data.context_length, config.data.batch_rows
    whole = torch.from_numpy(tokens[: len(tokens) // context * context]).view(-1, context)
    draw, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < rows:
            waiting = torch.cat([waiting, torch.randperm(len(whole), generator=draw)])
        yield whole[waiting[:rows]]
        waiting = waiting[rows:]


def masked(tokens: Tensor, mask: int, vocabulary: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels (-100: not predicted), as transformers' collator for masked language modeling makes them."""
    chosen = torch.rand(tokens.shape, generator=draw) < MASK_RATE
    fate = torch.rand(tokens.shape, generator=draw)
    inputs = torch.where(chosen & (fate < MASKED), mask, tokens)
    drawn = torch.randint(vocabulary, tokens.shape, generator=draw)
    inputs = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), drawn, inputs)
    return inputs, torch.where(chosen, tokens, -100)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of ``step``, from 0: linear warmup, linear fall to 0."""
    warmup = round(WARMUP * steps)
    return peak * ((step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup))
