"""The gradient of one optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lm.config.settings import Config
from lm.data.keyed_random import Stream, key
from lm.model.device import autocast
from lm.objectives.mixture import MixedBatch
from lm.objectives.objective import Objective
from lm.training.distributed import Ranks


def step_gradients(
    objective: Objective, model: nn.Module, batch: Any, config: Config, step: int, ranks: Ranks | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Leave the gradient of a step's loss in the parameters; return the loss of each part that has rows, and its share.

    The batch's weights are normalized over the whole step, so the gradients of its micro-batches simply add up: k
    micro-batches give what one big batch gives, and so do the batches of k ranks: ``batch`` has this rank's rows, and
    what is returned is of all ranks. The losses add up to that of the step (for text in nats per token, times the
    part's share), and a share is one of the step's rows.
    """
    ranks = ranks or Ranks(next(model.parameters()).device)
    model.zero_grad()
    part = Pass(objective, model, batch, config, step, ranks)
    if isinstance(batch, MixedBatch):
        predicted, compared = batch.predicted, batch.compared
        losses, shares = _gradients_of_predicted(replace(part, batch=predicted, later=len(compared)))
        found, _ = _gradients_of_compared(replace(part, batch=compared))
        return losses | found, shares | dict.fromkeys(found, len(compared) / len(batch))
    return _gradients_of_compared(part) if objective.compares else _gradients_of_predicted(part)


@dataclass(frozen=True)
class Pass:
    """What the passes of a step need to know; ``later`` rows of the step, not in ``batch``, have their passes after."""

    objective: Any
    model: nn.Module
    batch: Any
    config: Config
    step: int
    ranks: Ranks
    later: int = 0

    @property
    def micro_batches(self) -> list[slice]:
        at_once = self.config.data.micro_batch_rows or len(self.batch)
        return [slice(first, first + at_once) for first in range(0, len(self.batch), at_once)]

    def through(self, what: str, rows: slice) -> Any:
        """A method of the objective on a micro-batch, with the dropout of its step and its first row."""
        config, ranks = self.config, self.ranks
        if config.model.dropout:
            in_batch = ranks.rank + (self.later + rows.start) * ranks.world  # its number among those of all ranks
            _seed_dropout(self.model, key(config.training.seed, Stream.DROPOUT, self.step, in_batch) >> 1)
        with autocast(ranks.device, config.training.precision, training=True):
            return ranks.call(what, self.objective, self.model, self.batch.rows(rows.start, rows.stop).to(ranks.device))


def _seed_dropout(model: nn.Module, seed: int) -> None:
    """Seed what dropout draws from. ``torch.manual_seed`` looks for other devices too, which takes 0.3 ms on a CPU."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(seed)


def _gradients_of_predicted(step: Pass) -> tuple[dict[str, Tensor], dict[str, float]]:
    """``step_gradients`` of a loss that is a sum over rows."""
    ranks, batch = step.ranks, step.batch
    rows = len(batch) + step.later
    names: list[str] = []
    sums = torch.zeros((), device=ranks.device)
    for part in step.micro_batches:
        with ranks.accumulating(last=part.stop >= len(batch) and not step.later):
            by_name = step.through("loss", part)
            names, losses = list(by_name), torch.stack(list(by_name.values()))
            losses.sum().backward()
        sums = sums + losses.detach()
    sums, counts = ranks.sum(sums, torch.tensor([batch.parts.get(name, rows) for name in names]))
    shares = {name: count / (rows * ranks.world) for name, count in zip(names, counts.tolist(), strict=True) if count}
    return {name: loss for name, loss in zip(names, sums, strict=True) if name in shares}, shares


def _gradients_of_compared(step: Pass) -> tuple[dict[str, Tensor], dict[str, float]]:
    """``step_gradients`` of a loss that compares all rows of a step with each other, in the memory of a micro-batch.

    The method is that of ``accumulated_over_vectors``: every rank computes the loss from the vectors of all ranks, and
    backpropagates its own rows' share. A single pass is enough where one micro-batch is the whole step.
    """
    objective, parts, ranks = step.objective, step.micro_batches, step.ranks
    single = len(parts) == 1 and ranks.world == 1

    def of_all(what: str) -> Tensor:
        found = [step.through(what, part) for part in parts]
        return found[0] if single else ranks.rows_of_all(torch.cat(found))

    with torch.no_grad():
        targets = of_all("targets") if objective.memory is not None else None
    with torch.set_grad_enabled(single):
        vectors = of_all("vectors")
    compared = vectors.detach().requires_grad_()
    losses = objective.compare(compared, targets)
    (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), compared)
    own = gradient[ranks.rank :: ranks.world]
    for part in parts:
        with ranks.accumulating(last=part is parts[-1]):
            again = vectors if single else step.through("vectors", part)
            again.backward(own[part])
    if targets is not None:
        objective.observe(targets)
    return {name: loss.detach() for name, loss in losses.items()}, dict.fromkeys(losses, 1.0)


Part = TypeVar("Part")


def accumulated(
    model: nn.Module, parts: Sequence[Part], loss: Callable[[nn.Module, Part], Tensor], config: Config, step: int
) -> Tensor:
    """Leave the gradient of a step's loss, the sum over its parts, in the parameters; return that sum."""
    model.zero_grad()
    total = torch.zeros(())
    for number, part in enumerate(parts):  # each draws its dropout from the seed, the step and its number
        _seed_dropout(model, key(config.training.seed, Stream.FINETUNING_DROPOUT, step, number) >> 1)
        cost = loss(model, part)
        cost.backward()
        total = total.to(cost.device) + cost.detach()
    return total


def accumulated_over_vectors(
    model: nn.Module,
    parts: Sequence[Part],
    vectors: Callable[[nn.Module, Part], Tensor],
    loss: Callable[[Sequence[Tensor]], Tensor],
    config: Config,
    step: int,
) -> Tensor:
    """Leave the gradient of a loss that compares the vectors of all parts in the parameters; return that loss.

    The gradient is exact with the memory of one part: the vectors are computed without a graph, then the loss's
    gradient with respect to them, and each part is computed again, with the same dropout, to backpropagate its share
    (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"). ``vectors`` returns
    those of a part, (vectors, width), and ``loss`` a scalar from those of each part.
    """

    def seeded(number: int, part: Part) -> Tensor:
        _seed_dropout(model, key(config.training.seed, Stream.FINETUNING_DROPOUT, step, number) >> 1)
        return vectors(model, part)

    model.zero_grad()
    with torch.no_grad():
        found = [seeded(number, part) for number, part in enumerate(parts)]
    total = loss([each.requires_grad_() for each in found])
    for number, (part, gradient) in enumerate(zip(parts, torch.autograd.grad(total, found), strict=True)):
        seeded(number, part).backward(gradient)
    return total.detach()
