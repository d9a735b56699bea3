"""nanochat's base training by its own model, optimizer and data loader.

    git clone https://github.com/karpathy/nanochat

The settings, schedules and scaling rules are those of its scripts/base_train.py, which is a script without functions;
window pattern "L" and micro-batches of a whole step as in its runs/runcpu.sh. The model and the optimizer are compiled
as there; compiling is not counted. ``rate`` is a factor on all of its learning rates.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.peer import Clock, OtherPeer, file_of, load_package

URL = "https://github.com/karpathy/nanochat"
RATES = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
DECAY, WARMUP_STEPS, WARMDOWN, LEAST_RATE, TOKENS_PER_PARAMETER, REFERENCE_BATCH = 0.28, 40, 0.65, 0.05, 12, 2**19
DOCUMENTS_AT_ONCE = 128
SOFTCAP = 15  # of the logits


class Nanochat(OtherPeer):
    objective = "next_token"
    rates = (0.5, 1.0, 2.0)
    changes = (
        "layers, heads and width of the recipe, in place of width 64 x depth",
        "documents are tokens of the shards, in place of parquet files of text; the loader's packing is its own",
    )

    @property
    def dtype(self) -> torch.dtype:
        """In which training steps compute."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def modules(self) -> list[ModuleType]:
        os.environ["NANOCHAT_DTYPE"] = str(self.dtype).removeprefix("torch.")
        file_of(self.checkout, URL, "nanochat/gpt.py")
        assert self.checkout is not None
        return load_package(self.checkout, ("nanochat.gpt", "nanochat.dataloader"))

    def new_model(self, gpt: ModuleType, layers: int, heads: int, width: int) -> Any:
        """The model without weights, on the meta device, as its constructor wants it."""
        settings = gpt.GPTConfig(
            sequence_len=self.config.data.context_length, vocab_size=self.vocab_size, n_layer=layers, n_head=heads,
            n_kv_head=heads, n_embd=width, window_pattern="L",
        )  # fmt: skip
        with torch.device("meta"):
            return gpt.GPT(settings)

    def train(self, rate: float, seed: int, steps: int) -> tuple[Any, list[float]]:
        gpt, dataloader = self.modules()
        gpt.COMPUTE_DTYPE = self.dtype  # type: ignore[attr-defined]
        torch.manual_seed(seed)
        shape, batch = self.config.model, self.config.data.batch_tokens
        model = self.new_model(gpt, shape.num_layers, shape.num_heads, shape.hidden_size)
        model.to_empty(device="cpu")
        model.init_weights()
        growth = math.sqrt(batch / REFERENCE_BATCH)
        decay = DECAY * growth * _scaling_parameters(self.new_model(gpt, 12, 6, 768)) / _scaling_parameters(model)
        factors = {name: value * growth * rate for name, value in RATES.items()}
        batches = self._batches(dataloader)
        compiled = torch.compile(model, dynamic=False)
        _compile(compiled, model, next(batches), factors)
        optimizer = model.setup_optimizer(**factors, weight_decay=decay)
        inputs, targets = next(batches)
        clock = Clock()
        for step in range(steps):
            compiled(inputs, targets).backward()
            inputs, targets = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, steps)
                if group["kind"] == "muon":
                    group["momentum"] = momentum(step, steps)
                    group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            model.zero_grad(set_to_none=True)
            clock.step()
        gpt.COMPUTE_DTYPE = torch.float32  # type: ignore[attr-defined]  # evaluation is in float32
        return model.float(), clock.times

    def _batches(self, dataloader: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
        def document_batches(
            split: str, resumed: Any, at_once: int
        ) -> Iterator[tuple[list[Any], tuple[int, int, int]]]:
            epoch, waiting = 1, list[list[int]]()
            while True:
                for document in self.documents():
                    waiting.append(document.tolist())
                    if len(waiting) == at_once:
                        yield waiting, (0, 0, epoch)
                        waiting = []
                epoch += 1

        def encode(documents: list[list[int]], prepend: int, num_threads: int) -> list[list[int]]:
            return [[prepend, *document] for document in documents]

        begin = self.corpora.processor.end_of_text_id
        tokenizer = SimpleNamespace(get_bos_token_id=lambda: begin, encode=encode)
        dataloader._document_batches = document_batches  # type: ignore[attr-defined]
        data, loader = self.config.data, dataloader.tokenizing_distributed_data_loader_bos_bestfit
        found: Iterator[tuple[Tensor, Tensor]] = loader(
            tokenizer, data.batch_rows, data.context_length, "train", tokenizer_batch_size=DOCUMENTS_AT_ONCE,
            device="cpu",
        )  # fmt: skip
        return found

    def states(self, model: Any, tokens: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        assert causal  # what follows a text changes nothing
        found: list[Tensor] = []
        with model.lm_head.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])):
            model(tokens)
        return found[0]

    def logits(self, model: Any, states: Tensor) -> Tensor:
        scores: Tensor = model.lm_head(states).float()
        return SOFTCAP * torch.tanh(scores / SOFTCAP)


def _scaling_parameters(model: Any) -> int:
    counts = model.num_scaling_params()
    return int(counts["transformer_matrices"] + counts["lm_head"])


def _compile(compiled: Any, model: Any, batch: tuple[Tensor, Tensor], factors: dict[str, float]) -> None:
    """Compile the model and the optimizer's steps, and change neither weights nor gradients."""
    before = copy.deepcopy(model.state_dict())
    compiled(*batch).backward()
    model.setup_optimizer(**factors).step()
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)


def rate_factor(step: int, steps: int) -> float:
    """The factor on all rates at ``step``: linear warmup, constant, linear fall."""
    fall = round(WARMDOWN * steps)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if step <= steps - fall:
        return 1.0
    left = (steps - step) / fall
    return left + (1 - left) * LEAST_RATE


def momentum(step: int, steps: int) -> float:
    """Muon's momentum at ``step``: it rises over 400 steps and falls with the rates."""
    fall = round(WARMDOWN * steps)
    if step < 400:
        return 0.85 + 0.12 * step / 400
    return 0.97 - 0.07 * max(0.0, (step - steps + fall) / fall)
