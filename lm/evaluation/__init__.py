"""How good a model is: losses, minimal pairs, choices and tasks, beside baselines."""
