"""From shards and example files to the rows of a step, by arithmetic alone."""
