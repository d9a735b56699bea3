"""Several processes under torchrun, with DDP or FSDP2; nothing else in the code knows about ranks.

A process is a rank among ``world``. Each computes its rows of every batch; gradients, losses and what is decided from
them are sums over all ranks, so that any number of ranks trains the same run. Code that may run in one of several
processes takes a ``Ranks``, which in a single process does nothing. ``joined`` makes the right one.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_prep.errors import MACHINE_ERROR_STATUS, USER_ERROR_STATUS, UserError
from data_prep.errors.command_names import command
from data_prep.settings import available_cores
from lm.config.settings import TrainingConfig
from lm.model.device import choose_device, total_memory
from lm.model.transformer import Trunk
from lm.objectives.objective import Objective

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement

Result = TypeVar("Result")

CPU = torch.device("cpu")

# The part of a device's memory that FSDP may fill with whole weights and a whole gradient (``fsdp_reshard`` "auto").
HELD_SHARE = 0.2

# Messages of gloo and the store when another process is gone; they come as plain RuntimeErrors.
LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe")


class _Passes(nn.Module):
    """A model and a method of the objective in one call, which is what DDP and FSDP can wrap.

    ``memory`` is the objective's, to be held in slices too; None: whole, or there is none.
    """

    def __init__(self, model: nn.Module, objective: Objective, memory: nn.Module | None) -> None:
        super().__init__()
        self.model, self.objective, self.memory = model, objective, memory

    def forward(self, what: str, batch: Any) -> Any:
        return getattr(self.objective, what)(self.model, batch)


class Ranks:
    """A single process, which has nothing to exchange; ``ManyRanks`` is one of several."""

    rank, world = 0, 1

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.rank == 0

    def describe(self) -> str:
        """For the line that describes the device; empty in a single process."""
        return ""

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on rank 0 only; every rank returns its result, or raises its UserError or OSError."""
        return work()

    def highest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return value

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums of small tensors over all ranks, the same bits on each (several ranks: float64, on the CPU)."""
        return tensors

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, of which each has as many, in the batch's order: rank 0's first, rank 1's first, …"""
        return rows

    def spread(self, model: nn.Module, objective: Objective | None) -> None:
        """Make ``model``, which has the same weights on every rank, ready for ``call``, on this rank's device.

        The objective's memory is spread with it.
        """
        model.to(self.device)
        if objective is not None and objective.memory is not None:
            objective.memory.to(self.device)

    def call(self, what: str, objective: Objective, model: nn.Module, batch: Any) -> Any:
        """A method of the objective, ``loss`` or one that returns vectors, on this rank's rows.

        ``backward`` of the result leaves the sum of all ranks' gradients.
        """
        return getattr(objective, what)(model, batch)

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Around the passes of a micro-batch; ranks need to exchange gradients only after the ``last``."""
        return nullcontext()

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that this rank holds."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole tensor, put together from the ranks' parts."""
        return tensor

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's part of a whole tensor, on the device of ``like`` and split like it."""
        return whole.to(like.device)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors for saving on rank 0, nothing on the others; all ranks must call it."""
        return dict(tensors)

    def slices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of each split tensor that this rank holds, and on rank 0 also what is not split."""
        return dict(tensors)

    def exchanged(self, value: Result) -> list[Result]:
        """The values of all ranks, in their order."""
        return [value]

    def reshard(self) -> None:
        """Free gathered weights after passes without a gradient; parameters are slices again."""

    def map_matrices(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """``function`` of a stack of matrices (n, rows, columns), each matrix computed by one of the ranks."""
        return function(stack)


class ManyRanks(Ranks):
    """One of several processes.

    With ``parallel`` "ddp" each holds all weights, with "fsdp" a slice of each, of which ``fsdp_reshard`` says how long
    they stay gathered (settings of the same names).
    """

    def __init__(self, device: torch.device, rank: int, world: int, settings: TrainingConfig) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(device)
        self.rank, self.world, self.parallel, self.fsdp_reshard = rank, world, settings.parallel, settings.fsdp_reshard
        self._mesh = init_device_mesh(device.type, (world,))

    def describe(self) -> str:
        return f"{self.world} processes ({self.parallel.upper()}), each on "

    def on_main(self, work: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0, device=CPU)
        if isinstance(outcome[0], (UserError, OSError)):
            raise outcome[0]
        result: Result = outcome[0]
        return result

    def highest(self, value: int) -> int:
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))

    def rows_of_all(self, rows: Tensor) -> Tensor:
        found = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(found, rows.contiguous())
        return torch.stack(found, dim=1).flatten(0, 1)

    def spread(self, model: nn.Module, objective: Objective | None) -> None:
        assert objective is not None  # only pretraining runs in several processes
        if objective.memory is not None:
            objective.memory.to(self.device)
        passes: nn.Module = _Passes(model, objective, objective.memory if self.parallel == "fsdp" else None)
        self._passes = passes
        if self.parallel == "ddp":
            self._passes = nn.parallel.DistributedDataParallel(passes.to(self.device), gradient_as_bucket_view=True)
            # Gradients are sums, while DDP averages; a lambda, since DDP refuses string annotations.
            self._passes.register_comm_hook(None, lambda _, bucket: _sum(bucket.buffer()))
            return
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of outputs that nothing changes in place
        self._once_a_step = self.fsdp_reshard == "step" or (self.fsdp_reshard == "auto" and self._may_hold(passes))
        after_forward = False if self._once_a_step else None  # None: all but the outermost module
        for trunk in [module for module in passes.modules() if isinstance(module, Trunk)]:
            for block in trunk:
                fully_shard(block, mesh=self._mesh, reshard_after_forward=after_forward)
        fully_shard(passes, mesh=self._mesh, reshard_after_forward=after_forward)
        for module in self._sharded():  # it would average, too
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _sharded(self) -> list[FSDPModule]:
        """The modules whose weights FSDP gathers together."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self._passes.modules() if isinstance(module, FSDPModule)]

    def _may_hold(self, passes: nn.Module) -> bool:
        """Whether whole weights and a whole gradient are a small part of each rank's memory; the same on all ranks."""
        needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in passes.parameters())
        sharing = _processes_here(self.world) if self.device.type == "cpu" else 1
        return not self.highest(needed * sharing > HELD_SHARE * total_memory(self.device))

    def call(self, what: str, objective: Objective, model: nn.Module, batch: Any) -> Any:
        return self._passes(what, batch)

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """DDP exchanges once a step, and so does FSDP where each rank may hold whole weights and a whole gradient."""
        if isinstance(self._passes, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else self._passes.no_sync()
        for module in self._sharded() if self._once_a_step else []:
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)
        return nullcontext()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if _is_split(tensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if _is_split(tensor) else tensor

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        if not _is_split(like):
            return super().cut(whole, like)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            whole = self.whole(tensor)
            if self.is_main:
                found[name] = whole.cpu()
        return found

    def slices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.local(tensor) for name, tensor in tensors.items() if self.is_main or _is_split(tensor)}

    def exchanged(self, value: Result) -> list[Result]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def reshard(self) -> None:
        for module in self._sharded():
            module.reshard()

    def map_matrices(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not _is_split(stack):
            same = DTensor.from_local(stack, self._mesh, [Replicate()], run_check=False)
            return self.local(self.map_matrices(function, same))
        mine = self._exchanged(stack, Shard(0)).to_local()
        made, shard = function(mine) if len(mine) else mine, [Shard(0)]
        split = DTensor.from_local(made, self._mesh, shard, run_check=False, shape=stack.shape, stride=stack.stride())
        return self._exchanged(split, stack.placements[0])

    def _exchanged(self, tensor: DTensor, placement: Placement) -> DTensor:
        """The tensor, split another way."""
        if self.device.type == "cpu":  # gloo has no all-to-all, and torch would warn about this
            from torch.distributed.tensor import Replicate

            tensor = tensor.redistribute(placements=[Replicate()])
        return tensor.redistribute(placements=[placement])


def _is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _sum(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """The sum over ranks, in progress."""
    return dist.all_reduce(gradients, async_op=True).get_future().then(lambda future: future.value()[0])


@contextmanager
def joined(settings: TrainingConfig) -> Iterator[Ranks]:
    """This process as one of the ranks that torchrun started, or as the only one.

    Whatever ends the block ends every rank, but only one of them reports it: the first rank with an error raises it,
    and the others exit quietly with its status.

    Raises:
        UserError: the device of the settings is not available.
        ConnectionError: another rank has died.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        device = choose_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        yield Ranks(device)
        return
    here = _processes_here(world)
    torch.set_num_threads(settings.threads or max(1, available_cores() // here))
    store, rank = _meeting_place()
    try:
        device = _device_of_rank(settings.device, here)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        yield ManyRanks(device, rank, world, settings)
        dist.destroy_process_group()
    except SystemExit:  # all ranks were asked to stop together
        dist.destroy_process_group()
        raise
    except (UserError, OSError) as error:
        _leave_unless_first(store, rank, USER_ERROR_STATUS if isinstance(error, UserError) else MACHINE_ERROR_STATUS)
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in LOST):
            raise
        _leave_unless_first(store, rank, MACHINE_ERROR_STATUS)
        raise ConnectionError(
            "another process of this run has died: the same command resumes from the newest checkpoint"
        ) from None


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def leave_unless_first(status: int) -> None:
    """Handle an error before ``joined``: return on the first rank that has it, exit with ``status`` on the others."""
    _leave_unless_first(*_meeting_place(), status)


def _processes_here(world: int) -> int:
    """How many of the ``world`` processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _meeting_place() -> tuple[dist.Store, int]:
    """The store shared by all ranks, and this rank, from torchrun's variables."""
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    return store, rank


def _device_of_rank(name: str, here: int) -> torch.device:
    """The device of this rank, one of ``here`` on this machine."""
    device = choose_device(name)
    if device.type == "mps":
        raise UserError(
            "several processes train on CPUs or on CUDA GPUs: add --device cpu, "
            f"or start {command('train')} without torchrun"
        )
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise UserError(
                f"{here} processes share this machine's {gpus} GPUs: start torchrun with --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _leave_unless_first(store: dist.Store, rank: int, status: int) -> None:
    """Return on the first rank that calls it; end the others with that rank's status.

    In a process group they end as of ``end_rank``.
    """
    own = f"{rank} {status}"
    try:
        first = store.compare_set("ended", "", own).decode()
    except (RuntimeError, OSError):  # the store was the dead process's: better to report it twice than not at all
        return
    if first != own:
        time.sleep(1.0)  # torchrun ends all ranks as soon as one has ended: let the first one report
        if dist.is_initialized():
            end_rank(int(first.split()[1]))
        raise SystemExit(int(first.split()[1])) from None


def end_rank(status: int) -> NoReturn:
    """End this process without Python's shutdown: a thread of gloo that then waits for Python's lock would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
