"""From token shards and example files to the rows of a step, computed from its number.

Nothing is imported here: shards and examples are opened, and found wrong, without PyTorch.
"""
