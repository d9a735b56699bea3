"""A run on disk: its directory, checkpoints, log and base weights."""

from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import CheckpointWriter
from lm.runs.directory import Run, open_run
from lm.runs.metrics_log import MetricsLog
from lm.runs.resume import open_or_create

__all__ = ["Checkpoint", "CheckpointWriter", "MetricsLog", "Run", "open_or_create", "open_run"]
