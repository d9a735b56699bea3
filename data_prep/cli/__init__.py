"""The command line: ``python -m data_prep``."""
