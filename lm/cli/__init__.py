"""What is typed after ``kindling``: a file for each command; ``main`` puts them together.

PyTorch is imported inside the commands, so that ``--help`` and a mistyped setting answer at once.
"""
