"""A run on disk: its directory, checkpoints, log and base weights."""
