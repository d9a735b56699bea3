"""The kernels on a GPU: are they right, and how fast beside PyTorch's own. ``python -m benchmarks.gpu``."""
