"""Fine-tuning of any peer's model, by Kindling's fine-tuning: the same examples, head, steps and optimizer for all."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.written_run import written_run
from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.recipes import finetuning_config
from lm.config.settings import Config
from lm.evaluation.task_file import read_tasks
from lm.evaluation.task_table import Task, read_task
from lm.evaluation.tuned_rows import write_examples
from lm.finetuning.finetune import Finetuning
from lm.model.transformer import Transformer
from lm.runs.checkpoint_writer import load_trained
from lm.runs.directory import Run, open_run, warn
from lm.training.distributed import Ranks
from lm.training.reporter import NullReporter
from lm.training.trainer import fit

Readable = Callable[[Any], Transformer]


class PeerFinetuning(Finetuning):
    """A fine-tuning of ``trained``, a peer's model, which ``readable`` makes a ``Transformer``; it stays as it is."""

    def __init__(self, trained: nn.Module, readable: Readable, config: Config, path: Path, ranks: Ranks) -> None:
        super().__init__(config, path, ranks)
        self.trained, self.readable = trained, readable

    def model(self) -> nn.Module:
        model = self.task.model(self.readable(copy.deepcopy(self.trained)))
        for parameter in model.parameters():
            parameter.grad = None
        self.task.gradients(model, self.batch(0), 0)
        for parameter in model.parameters():  # such as the matrix of a vocabulary's head
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        return model


def task_scores(
    trained: nn.Module, readable: Readable, tokenizer: Tokenizer, config: Config, file: Path, seed: int
) -> dict[str, dict[str, float]]:
    """The metrics on the test examples of each task of a file for ``kindling tasks`` (its settings for ``full``).

    ``config`` is that of a run with the peer's shape and objective, which decides how texts are read.
    """
    with tempfile.TemporaryDirectory() as folder:
        random = Transformer(config.model).initialize(0).state_dict()
        base = written_run(Path(folder) / "base", tokenizer, config, random)  # for its settings and tokenizer
        learn = partial(_scores, partial(PeerFinetuning, trained, readable), base, seed=seed)
        return {task.name: learn(task, Path(folder) / task.name) for task in read_tasks(base, file, {})}


def _scores(
    open_module: Callable[[Config, Path, Ranks], PeerFinetuning], base: Run, task: Task, path: Path, *, seed: int
) -> dict[str, float]:
    """Fine-tune in the run directory ``path``; return the metrics of its best step on the test examples."""
    examples = read_task(task).of_seed(seed)
    parts = dict(zip(("train", "validation"), examples.parts(seed), strict=True)) | {"test": examples.test}
    files = {name: path.with_name(f"{task.name}-{name}.jsonl") for name in parts}
    for name, part in parts.items():
        write_examples(files[name], part)
    own: dict[str, Any] = {"task": task.kind, "train": str(files["train"]), "validation": str(files["validation"])}
    own |= {"judged_by": task.judged_by, "seed": seed, "device": "cpu"}
    config = finetuning_config(base.path, base.config, {**task.settings["full"], **own})
    if config.finetune.pairs == "auto":
        raise UserError(f'task "{task.name}": name how pairs are read: apart or together')
    fit(partial(open_module, config, path), config.training, path, NullReporter())
    run = open_run(path)
    tested = open_module(run.config.replace(validation=str(files["test"])), path, Ranks())
    model = tested.model()
    load_trained(model, run.checkpoint("best", warn).model())
    found: dict[str, float] = tested.validate(model)[0]["metrics"]
    return found
