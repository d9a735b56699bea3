"""HTML pages about runs and tasks."""
