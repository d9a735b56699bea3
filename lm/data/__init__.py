"""From token shards and example files to the rows of a step, computed from its number."""

from lm.data.batch import Batch, Rows, Vocabulary
from lm.data.corpora import Corpora, open_corpora
from lm.data.examples import Example, read_examples
from lm.data.packed_sequences import packed
from lm.data.rows import TrainingRows, ValidationRows

__all__ = [
    "Batch",
    "Corpora",
    "Example",
    "Rows",
    "TrainingRows",
    "ValidationRows",
    "Vocabulary",
    "open_corpora",
    "packed",
    "read_examples",
]
