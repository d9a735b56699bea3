"""Correctness and speed of the kernels on a GPU, compared with PyTorch's: ``python -m benchmarks.gpu``."""
