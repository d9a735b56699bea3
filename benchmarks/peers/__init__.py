"""Other systems' training, driven on Kindling's tokens for ``benchmarks.vs_peers``; one file a family."""
