"""Learn a task from labeled examples."""
