"""The training loop, its optimizer, and what guards it."""
