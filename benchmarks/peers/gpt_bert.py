"""GPT-BERT (Charpentier and Samuel 2024) by its own code: model_extra.py, lamb.py, dataset.py and utils.py.

    git clone https://github.com/ltgoslo/gpt-bert

The settings are the defaults of its train_10m.py: LAMB, dropout 0.1, masking that falls from 30 % to 15 %, batches that
grow from a quarter to the whole, rows of a quarter of the context for 70 % of the steps and of a half until 90 %. The
script itself needs CUDA, NCCL, SLURM and wandb, and gives each GPU one of the two objectives. Here both stand in one
batch, as the model's ``num_masked`` and ``ratio`` provide for; the average over 16 GPUs is their ratio.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Clock, OtherPeer, file_of, load_file

URL = "https://github.com/ltgoslo/gpt-bert"
WARMUP = COOLDOWN = 0.016
LEAST_RATE, BATCH_REDUCTION, CLIP, DECAY, BETAS, EPSILON, Z_LOSS = 0.1, 4, 2.0, 0.1, (0.9, 0.98), 1e-8, 1e-4
MASKING = {"mask_p_start": 0.3, "mask_p_end": 0.15, "mask_random_p": 0.1, "mask_keep_p": 0.1}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
BUCKETS, NORM_EPSILON = 32, 1e-5


class GptBert(OtherPeer):
    """15 of 16 rows masked, as published."""

    objective = "hybrid"
    rates = (0.007, 0.0141, 0.0282)
    changes = (
        "one process on the CPU in place of DDP and NCCL; no wandb",
        "bfloat16 only where the CPU multiplies it",
        "both objectives in one batch, weighted by their share, in place of one objective for each GPU",
        "batch size follows the ramp at every step, not at every epoch",
        "the weights themselves are measured, not their moving average (0.999 is longer than these runs)",
        "rows of up to the context of the recipe, in place of 512 tokens",
    )
    masked_share = 15 / 16

    def module(self, name: str) -> ModuleType:
        return load_file(file_of(self.checkout, URL, f"pretraining/{name}.py"))

    def rows_of_step(self, step: int, steps: int) -> tuple[int, int]:
        """Rows, and tokens in each."""
        done = (step + 1) / steps
        part = 1 if done >= 0.9 else 2 if done >= 0.7 else 4
        length = self.config.data.context_length // part
        whole, share = self.config.data.batch_tokens / length, step / steps
        return max(2, int(whole / BATCH_REDUCTION * (1 - share) + whole * share + 0.5)), length

    def tokens_of_step(self, step: int, steps: int) -> int:
        rows, length = self.rows_of_step(step, steps)
        return rows * length

    def new_model(self) -> Any:
        shape = self.config.model
        config = SimpleNamespace(
            hidden_size=shape.hidden_size, intermediate_size=shape.feed_forward_width, vocab_size=self.vocab_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, position_bucket_size=BUCKETS,
            max_position_embeddings=self.config.data.context_length + 1, layer_norm_eps=NORM_EPSILON, **DROPOUT,
        )  # fmt: skip
        return self.module("model_extra").Bert(config)

    def train(self, rate: float, seed: int, steps: int) -> tuple[Any, list[float]]:
        torch.manual_seed(seed)
        random.seed(seed)
        model = self.new_model().train()
        optimizer = self._optimizer(model, rate)
        schedule = self.module("utils").cosine_schedule_with_warmup_cooldown(
            optimizer, int(steps * WARMUP), int(steps * COOLDOWN), steps, LEAST_RATE
        )
        with tempfile.TemporaryDirectory() as folder:
            batches = self._batches(self._datasets(Path(folder), steps), seed, steps)
            clock = Clock()
            for tokens, unseen, targets, masked in batches:
                with self.autocast():
                    found = model(tokens, unseen, targets, num_masked=masked, ratio=self.masked_share)
                (found[0] + Z_LOSS * found[-2]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                clock.step()
        return model, clock.times

    def _optimizer(self, model: nn.Module, rate: float) -> Any:
        named = [(any(part in name for part in ("bias", "layer_norm")), p) for name, p in model.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for plain, p in named if not plain], "weight_decay": DECAY},
            {"params": [p for plain, p in named if plain], "weight_decay": 0.0},
        ]
        return self.module("lamb").Lamb(groups, rate, betas=BETAS, eps=EPSILON)

    def _datasets(self, folder: Path, steps: int) -> dict[int, list[Any]]:
        """The masked and the causal rows of each length."""
        dataset, tokenizer = self.module("dataset"), self.corpora.processor
        names = {"<mask>": tokenizer.mask_id, "<s>": tokenizer.end_of_text_id, "<pad>": tokenizer.padding_id}
        stand_in = SimpleNamespace(token_to_id=names.__getitem__)
        special = max(names.values()) + 1
        settings = SimpleNamespace(n_special_tokens=special, vocab_size=self.vocab_size, max_steps=steps, **MASKING)
        torch.save([torch.from_numpy(document) for document in self.documents()], folder / "tokens.bin")
        lengths = {self.rows_of_step(step, steps)[1] for step in range(steps)}
        kinds = (dataset.MaskedDataset, dataset.CausalDataset)
        return {n: [kind(folder / "tokens.bin", stand_in, settings, n, None, None) for kind in kinds] for n in lengths}

    def _batches(
        self, sets: dict[int, list[Any]], seed: int, steps: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Inputs (T, rows), what is not seen (rows, T, T), targets (T, rows) and how many rows are masked."""
        length, draw = 0, torch.Generator().manual_seed(seed)
        for step in range(steps):
            rows, wanted = self.rows_of_step(step, steps)
            if wanted != length:
                length = wanted
                orders: list[list[int]] = [[], []]
            masked = min(rows - 1, max(1, round(rows * self.masked_share)))
            found = []
            for own, order, count in zip(sets[length], orders, (masked, rows - masked), strict=True):
                own.set_global_step(step)
                while len(order) < count:
                    order += torch.randperm(len(own), generator=draw).tolist()
                found += [own[order.pop()] for _ in range(count)]
            inputs, targets, unseen, _ = zip(*found, strict=True)
            yield torch.stack(inputs, 1), torch.stack(unseen), torch.stack(targets, 1), masked

    def states(self, model: Any, tokens: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        place = torch.arange(tokens.shape[1])
        unseen = (place >= lengths[:, None])[:, None].expand(-1, len(place), -1)
        if causal:
            unseen = unseen | (place > place[:, None])
        states: Tensor = model.get_contextualized(tokens.t(), unseen).transpose(0, 1)
        return states

    def logits(self, model: Any, states: Tensor) -> Tensor:
        scores: Tensor = model.classifier.nonlinearity(states)
        return scores


class GptBertMixed(GptBert):
    """Half of the rows masked, as in the "mixed" baseline of BabyLM 2025."""

    masked_share = 1 / 2
