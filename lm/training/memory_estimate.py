"""The memory of a training step, counted before it runs.

    settings -> a step of a model with one layer, and with two, on tensors that have shapes and no memory, or, where
                it takes less time, on real ones
             -> bytes that are alive at once, operation by operation -> a line through both, up to all layers

So the count follows the model, its kernels and the optimizer by itself. It is exact for what PyTorch's allocator is
asked for, except for the kernels' small working memory (tested against what autograd saves, and the allocator).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm.config.optimizer_settings import OptimizerConfig
from lm.config.settings import Config, DataConfig, TrainingConfig
from lm.kernels.cross_entropy import tokens_at_once
from lm.kernels.dispatch import simulated_gpu
from lm.model.device import available_memory, uses_bfloat16
from lm.objectives.objective import open_objective
from lm.training.optimizer import Optimizer
from lm.training.weight_average import WeightAverage

# Computing a small step takes less time than importing torch._dynamo, which tensors without memory need (1.5 s).
SMALL_FLOPS, SMALL_TOKENS, AMPLE_BYTES = 5e10, 4096, 2e9


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step holds, by part; ``activations`` is everything else at its peak, ``average`` that of weights."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    average: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.average


def step_memory(config: Config, rows: int, device: torch.device) -> StepMemory:
    """The memory of an optimizer step in micro-batches of ``rows`` rows, for a model with a known vocabulary.

    Counted for PyTorch's own operations; Triton's kernels on a GPU save a little less.
    """
    low_precision = uses_bfloat16(device, config.training.precision)
    data = config.data
    shape = DataConfig(
        context_length=data.context_length, batch_tokens=data.batch_tokens, batch_images=data.batch_images
    )
    chosen = config.optimizer
    kind = OptimizerConfig(
        optimizer=chosen.optimizer, muon_beta2=chosen.muon_beta2, cautious_weight_decay=chosen.cautious_weight_decay
    )
    averaging = TrainingConfig(average_last=config.training.average_last)
    counted = Config(config.model, shape, config.objective, config.views, kind, averaging)
    return _counted(counted, rows, device.type, low_precision)


@lru_cache(maxsize=64)
def _counted(config: Config, rows: int, device: str, low_precision: bool) -> StepMemory:
    layers = config.model.num_layers
    real = device == "cpu" and _is_small(config.replace(num_layers=3), rows)
    one, two = (
        _simulated(config.replace(num_layers=number), rows, device, low_precision, real=real) for number in (1, 2)
    )
    weights, gradients, average, optimizer, passes, update = (
        first + (second - first) * (layers - 1) for first, second in zip(one, two, strict=True)
    )
    activations = max(passes, update) - weights - gradients - average - optimizer
    return StepMemory(weights, gradients, optimizer, activations, average)


def _is_small(config: Config, rows: int) -> bool:
    """Whether a step of ``rows`` rows takes little time, and next to none of the memory that is available."""
    context = config.data.context_length
    tokens, objective = rows * context, open_objective(config)
    with torch.device("meta"):
        flops = tokens * objective.flops_per_token(objective.new_model(), context)
    return flops < SMALL_FLOPS and tokens <= SMALL_TOKENS and available_memory(torch.device("cpu")) > AMPLE_BYTES


def _simulated(
    config: Config, rows: int, device: str, low_precision: bool, *, real: bool = False
) -> tuple[int, int, int, int, int, int]:
    """Bytes of weights, gradients, averaged weights and optimizer, and the peaks of the passes and of the update.

    ``real``: compute the step, instead of only following the shapes of its tensors.
    """
    objective = open_objective(config)
    gpu = nullcontext() if device == "cpu" else simulated_gpu()
    with gpu, nullcontext() if real else FakeTensorMode(), LiveBytes(device) as live:
        model = objective.new_model()
        objective.begin(model)
        weights = live.now
        mean = WeightAverage(model) if config.training.average_last else None
        average = live.now - weights
        optimizer = Optimizer(model, config.optimizer)
        early = live.now
        batch = objective.example(rows)
        if rows < config.data.batch_rows:  # an earlier micro-batch has left its gradients
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            found = objective.loss(model, batch)
        torch.stack(list(found.values())).sum().backward()
        passes = live.peak
        del found, batch
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        live.peak = live.now
        optimizer.clip()
        optimizer.step(1.0)
        after = live.now - gradients
        # The optimizer state of the first update exists during the passes of all later steps.
        del mean
        return weights, gradients, average, after - weights - average, passes + after - early, live.peak


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of live storages, ``now`` and at the ``peak``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = torch.device(device)
        self._seen: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and PyTorch would import torch._dynamo to skip it."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        if func is torch.ops.kindling.linear_cross_entropy.default:
            hidden, weight = args[:2]
            chunk = min(len(hidden), tokens_at_once(self._device, len(weight)))
            number = 4 if self._device.type == "cpu" else hidden.element_size()
            self.peak = max(self.peak, self.now + chunk * len(weight) * number)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
