"""What is learned: an objective turns rows into a batch, and a batch into named losses."""
