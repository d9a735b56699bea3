"""What is typed after ``kindling``: a file for each command; ``lm.cli.main`` puts them together.

PyTorch is imported inside the commands, so that ``--help`` and a mistyped setting answer at once.
"""


def main() -> None:
    """The console script of installations older than this file; new ones call ``lm.cli.main.main``."""
    from lm.cli.main import main as command

    command()
