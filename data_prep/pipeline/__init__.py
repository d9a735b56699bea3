"""A build: restartable, over many workers, the same bytes each time."""
