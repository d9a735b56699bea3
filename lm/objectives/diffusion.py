"""Masked diffusion (Sahoo et al. 2024, MDLM; Nie et al. 2025, LLaDA): predict any share of a text from the rest.

Of each row a share t of the tokens is hidden, drawn evenly between 0 and 1, each token independently of the others and
always behind the mask token. The loss is the cross-entropy of the hidden tokens divided by t. Its expectation bounds
the negative log-likelihood of the text from above (Nie et al. 2025, equation 3), and the model writes by filling
masks in rounds (``lm.inference.fill_mask``).

As in ``masked_next_token``, a hidden token is predicted one position to the left (as in Gong et al. 2025, DiffuLLaMA):
a mixture with next_token then asks one thing of the head, and a causal model can be trained further.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from lm.data.batch import Batch, Rows, assemble
from lm.data.keyed_random import Stream, key, permuted, uniform
from lm.data.rows import ValidationRows
from lm.objectives.objective import Measure
from lm.objectives.text import TextObjective, bits_per_byte, loss_on_text, targets_of_hidden

BOUND = "diffusion_bound"  # the name of what a validation measures


class Diffusion(TextObjective):
    """Tokens are hidden at another rate in each row; ends of text, and tokens without a left neighbor, never are.

    A row may have no hidden token. The loss of a step is divided by its number of tokens that could have been hidden.
    """

    def prepare(self, rows: Rows) -> Batch:
        inputs = rows.inputs
        can_be_hidden = ~(self.vocabulary.borders(inputs) | rows.starts)
        rates = self.rates(rows)
        hidden = can_be_hidden & (
            uniform(key(self.seed, Stream.DIFFUSED_TOKENS), rows.numbers, inputs.shape[1]) < rates[:, None]
        )
        padded = bool((rows.lengths < inputs.shape[1]).any())
        weights = 1 / (rates * max(1, int(can_be_hidden.sum())))
        return self.hiding(inputs, rows.starts, hidden, weights, rows.lengths if padded else None)

    def rates(self, rows: Rows) -> NDArray[np.float64]:
        """The rate of each of a step's rows, float64 (rows,), above ``lowest_diffusion_rate`` and at most 1.

        They are 1 / rows apart, beginning at a place that is drawn for each step: each is uniform, but a step has low
        and high ones alike, which makes its loss less noisy (Kingma et al. 2021, appendix I.1).
        """
        count, lowest = len(rows.numbers), self.config.lowest_diffusion_rate
        first = uniform(key(self.seed, Stream.DIFFUSION_RATES), rows.numbers[:1], 1)[0, 0]
        return 1 - (1 - lowest) * ((first + np.arange(count) / count) % 1)

    def hiding(
        self,
        inputs: NDArray[np.int64],
        starts: NDArray[np.bool_],
        hidden: NDArray[np.bool_],
        weights: NDArray[np.float64],
        lengths: NDArray[np.int64] | None = None,
    ) -> Batch:
        """A batch that predicts the ``hidden`` tokens, each with the weight of its row; the rest as of ``assemble``."""
        targets = targets_of_hidden(inputs, hidden, shifted=True)
        weight_of = np.where(targets >= 0, weights[:, None], 0).astype(np.float32)
        shown, both = np.where(hidden, self.vocabulary.mask, inputs), np.ones(len(inputs), dtype=bool)
        return assemble(shown, targets, weight_of, starts, both, lengths, {self.name: len(inputs)})

    def measured(
        self, held_out: ValidationRows, numbers: NDArray[np.int64], measure: Measure, *, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """The bound of the negative log-likelihood of these windows, given the token before each and where texts end.

        The rates are always the same ones: one for each window, or ``diffusion_passes`` of them with ``every_token``.
        """
        passes, split = self.config.diffusion_passes if every_token else 1, held_out.split
        width = held_out.context_length + 1

        def batch(number: int, some: NDArray[np.int64]) -> Batch:
            windows, real = held_out.windows(some)
            rank = permuted(np.searchsorted(numbers, some), len(numbers), key(0, Stream.DIFFUSION_BOUND))
            rates = (number + (rank + 0.5) / len(numbers)) / passes
            return self.bound_batch(windows, real, rates, uniform(key(0, Stream.DIFFUSED_TOKENS, number), some, width))

        nats, weight = measure(numbers, [partial(batch, number) for number in range(passes)])
        per_token = nats / max(weight, 1)
        bits = bits_per_byte(per_token * (split.tokens - split.documents), split.counted_bytes)
        return {BOUND: loss_on_text(per_token, round(weight / passes), bits)}

    def bound_batch(
        self,
        windows: NDArray[np.int64],
        real_tokens: NDArray[np.int64],
        rates: NDArray[np.float64],
        draws: NDArray[np.float64],
    ) -> Batch:
        """A batch whose loss is an estimate of the bound, with weights that add up to the tokens it is about.

        Of a window's L tokens the l = ⌈rate · L⌉ with the smallest ``draws`` are hidden, with the weight L / l. Over
        rates that are uniform in (0, 1] the expectation is that of the loss without a lowest rate: the mean, over all
        orders of the tokens, of what the text costs in that order (Nie et al. 2025, equation 6; Hoogeboom et al. 2022).
        """
        within = np.arange(windows.shape[1])[None] <= real_tokens[:, None]
        can_be_hidden = within & (windows != self.vocabulary.end_of_text)
        can_be_hidden[:, 0] = False
        counts = can_be_hidden.sum(axis=1)
        hide = np.minimum(np.ceil(rates * counts).astype(np.int64), counts)
        draws = np.where(can_be_hidden, draws, 2.0)
        hidden = draws.argsort(axis=1).argsort(axis=1) < hide[:, None]
        starts = windows == self.vocabulary.end_of_text
        return self.hiding(self.vocabulary.with_beginnings(windows), starts, hidden, counts / np.maximum(hide, 1))


open_objective = Diffusion
