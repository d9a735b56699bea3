"""Side by side with the peers: each module is one command, ``python -m benchmarks.NAME``."""
