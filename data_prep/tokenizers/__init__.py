"""Tokenizers: train, load and prove them, and encode text fast."""

from data_prep.tokenizers.encoders import choose_encoder, make_encoder
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype
from data_prep.tokenizers.training import train_tokenizer

__all__ = ["Tokenizer", "choose_encoder", "load_tokenizer", "make_encoder", "token_dtype", "train_tokenizer"]
