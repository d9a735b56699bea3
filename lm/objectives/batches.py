"""The batches of a run, ``batch = f(seed, step)``: the data's rows, prepared by the objective."""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from lm.config.objective_settings import TEXT_VIEW_OBJECTIVES
from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.image_corpora import ImageCorpora
from lm.data.training_data import training_rows
from lm.objectives.objective import Objective, open_objective


class TrainingBatches:
    """One batch per step, by the settings' objective unless another is given; errors as of ``training_rows``."""

    def __init__(self, corpora: Corpora | ImageCorpora, config: Config, objective: Objective | None = None) -> None:
        self.rows, self.shares = training_rows(corpora, config), config.objective.shares
        self.objective = objective or open_objective(config, self.rows.inputs)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Any:
        """Rank ``rank``'s share of the batch of optimizer step ``step`` (from 0): its rows rank, rank + world, …

        The shares of all ranks together are the batch, loss weights included, whatever the number of ranks. Each rank
        prepares the whole batch, because the weights depend on what is hidden in all of its rows. Raise UserError if
        the rows do not divide among the ranks.
        """
        self.check_ranks(world)
        batch = self.objective.prepare(self.rows.of_step(step))
        return batch if world == 1 else batch.every(rank, world)

    def check_ranks(self, world: int) -> None:
        """Raise a UserError if the rows of a batch that are predicted, or compared, do not divide among ``world``."""
        kinds: dict[bool, list[str]] = {}
        for name in self.shares:
            kinds.setdefault(name in TEXT_VIEW_OBJECTIVES, []).append(name)
        for names in kinds.values():
            if (rows := self.rows.batch_rows * sum(self.shares[name] for name in names)) % world:
                whose = f" of {' and '.join(names)}" if len(kinds) > 1 else ""
                raise UserError(
                    f"the batch's {rows} rows{whose} do not divide among {world} ranks: change batch_tokens or the "
                    "ranks"
                )
