"""Shards: datasets of tokens on disk, read, written, inspected and converted."""

from data_prep.shards.convert import export_dataset, import_dataset
from data_prep.shards.counts import token_counts
from data_prep.shards.inspect import inspect_dataset
from data_prep.shards.tokens import Dataset, Split, open_dataset

__all__ = ["Dataset", "Split", "export_dataset", "import_dataset", "inspect_dataset", "open_dataset", "token_counts"]
