"""Measure a trained model: python evaluate.py runs/mine"""

from lm.cli.evaluate import evaluate

if __name__ == "__main__":
    evaluate()
