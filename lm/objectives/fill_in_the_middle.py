"""Fill in the middle (Bavarian et al. 2022): next-token prediction of documents whose middle has moved to the end."""

from __future__ import annotations

import numpy as np

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.batch import IGNORED, Batch, Rows, Vocabulary
from lm.data.keyed_random import Stream, key, uniform_at
from lm.objectives.drawn_text import DrawnText, documents_of

ADDED = 4  # the tokens before the prefix, the suffix and the middle, and the end of text after the middle
FEWEST = ADDED + 3  # positions of a document that is rearranged


class FillInTheMiddle(DrawnText):
    """A share ``infill_rate`` of the documents is cut in three between tokens and rearranged, the others stay.

    Of those, a share ``suffix_first_rate`` begins with the suffix (SPM, "variant 2" of appendix D), the others with the
    prefix (PSM). The row does not become longer: a rearranged document gives up its last tokens for those that are
    added. An end of text follows each middle, also where the row has cut the document. The three tokens that introduce
    a part are not predicted, so that a text that is continued never contains them.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        if vocabulary.infill is None:
            raise UserError(
                f"the tokenizer has no <|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>, which {self.name} needs: "
                "build the data with --extra-token infill"
            )
        self.infill = vocabulary.infill

    def drawn(self, rows: Rows, seed: int) -> Batch:
        before, after, middle = self.infill
        inputs, targets = rows.inputs.copy(), rows.targets.copy()
        row, first, stop = documents_of(rows)
        draws = [uniform_at(key(seed, Stream.INFILL, n), rows.numbers[row], first) for n in range(4)]
        chosen = np.flatnonzero((draws[0] < self.config.infill_rate) & (stop - first >= FEWEST))
        for n in chosen.tolist():
            r, begin, end = int(row[n]), int(first[n]), int(stop[n])
            length = end - begin - ADDED
            text = targets[r, begin : begin + length].tolist()
            one, two = sorted(int(draw[n] * (length + 1)) for draw in draws[2:])
            prefix, hidden, suffix = text[:one], text[one:two], text[two:]
            if draws[1][n] < self.config.suffix_first_rate:
                made = [before, after, *suffix, middle, *prefix, *hidden]
            else:
                made = [before, *prefix, after, *suffix, middle, *hidden]
            inputs[r, begin + 1 : end] = made
            targets[r, begin:end] = [*made, self.vocabulary.end_of_text]
        targets[np.isin(targets, self.infill)] = IGNORED
        return self.assembled(rows, inputs, targets)


open_objective = FillInTheMiddle
