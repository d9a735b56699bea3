"""What is typed after ``python -m data_prep``."""
