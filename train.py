"""Pretrain a model from a recipe: python train.py configs/tiny.toml --data data/mine --run runs/mine"""

from lm.cli.train import train

if __name__ == "__main__":
    train()
