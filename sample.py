"""Write with a trained model: python sample.py runs/mine --prompt "Once upon a time"."""

from lm.cli.sample import sample

if __name__ == "__main__":
    sample()
