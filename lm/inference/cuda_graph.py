"""A function of fixed tensors as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 2  # the first run compiles kernels, which a capture does not allow


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record ``run`` on the current device; the result repeats it on the same tensors and returns its one output.

    ``run`` reads and writes tensors that stay where they are, and never waits for the device. It is run before it is
    recorded. Raise RuntimeError if it cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
