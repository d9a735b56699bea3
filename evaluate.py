"""Measure a trained model: python evaluate.py runs/mine"""

from lm.commands.evaluate import evaluate

if __name__ == "__main__":
    evaluate()
