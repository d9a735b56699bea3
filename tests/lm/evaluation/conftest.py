from __future__ import annotations

import pytest

from lm.runs.directory import Run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter


@pytest.fixture(scope="session")
def image_run(pictures, seeing, tmp_path_factory) -> Run:
    """A run of four steps on ``pictures``."""
    config = seeing.replace(data=(str(pictures.directory),), steps=4)
    return train(config, tmp_path_factory.mktemp("runs") / "simclr", NullReporter())
