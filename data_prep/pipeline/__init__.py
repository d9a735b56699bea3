"""Pipeline: builds that any number of workers can share and that can be resumed."""

from data_prep.pipeline.build import BuildPlan, build_dataset
from data_prep.pipeline.estimate import Estimate, estimate_build
from data_prep.pipeline.workers import run_calls

__all__ = ["BuildPlan", "Estimate", "build_dataset", "estimate_build", "run_calls"]
