"""HTML pages about runs and tasks."""

from lm.reports.comparison import compare, write_comparison
from lm.reports.page import render
from lm.reports.run_report import write_report
from lm.reports.task_report import write_task_report

__all__ = ["compare", "render", "write_comparison", "write_report", "write_task_report"]
