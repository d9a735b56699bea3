"""The bytes of a dataset, and of other programs' datasets."""
