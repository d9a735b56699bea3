"""The subcommands of ``kindling``, a file each; ``lm.cli`` puts them together.

PyTorch is imported inside the commands, so that ``--help`` and a mistyped setting answer at once.
"""
