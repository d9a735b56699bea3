"""The settings of the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors.wording import counted
from lm.config.setting import setting


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer."""

    num_layers: int = setting(4, "number of transformer blocks", minimum=1, on_resume="never")
    hidden_size: int = setting(192, "width of the residual stream", minimum=8, on_resume="never")
    num_heads: int = setting(6, "number of query heads", minimum=1, on_resume="never")
    num_key_value_heads: int = setting(
        0, "number of key and value heads (grouped-query attention); 0: num_heads", minimum=0, on_resume="never"
    )
    head_size: int = setting(0, "width of one head, even; 0: hidden_size / num_heads", minimum=0, on_resume="never")
    feed_forward_size: int = setting(
        0, "width inside the feed-forward; 0: 8/3 (swiglu) or 4 (relu2) x hidden_size", minimum=0, on_resume="never"
    )
    activation: str = setting("swiglu", "feed-forward activation", choices=("swiglu", "relu2"), on_resume="never")
    qk_norm: bool = setting(False, "RMS-normalize queries and keys, per head", on_resume="never")
    tie_embeddings: bool = setting(True, "one matrix for the input embedding and the output head", on_resume="never")
    logit_softcap: float = setting(0.0, "limit logits to (-c, c) by c*tanh(x/c); 0: off", minimum=0, on_resume="never")
    dropout: float = setting(
        0.0, "dropout in embedding, attention, feed-forward", minimum=0, maximum=0.9, on_resume="never", finetuning=0.1
    )
    residual_precision: str = setting(
        "float32",
        "precision of the residual stream in training, where that of the products is bfloat16; bfloat16 moves half the "
        "bytes between the products of a GPU, and rounds what each block adds",
        choices=("float32", "bfloat16"),
        on_resume="free",
    )
    rope_theta: float = setting(10_000.0, "base of the rotary position frequencies", minimum=1, on_resume="never")
    norm_epsilon: float = setting(1e-6, "added to the mean square in RMSNorm", minimum=0, on_resume="never")
    vocab_size: int = setting(0, "vocabulary size; 0: that of the data's tokenizer", minimum=0, on_resume="never")
    patch_size: int = setting(
        0, "images: side of a patch in pixels, a divisor of the image size; 0: text", minimum=0, on_resume="never"
    )
    stem: str = setting(
        "linear",
        "images: what turns a patch into a vector: a linear map, which other libraries can load, or convolutions over "
        "the whole image",
        choices=("linear", "convolutional"),
        on_resume="never",
    )
    image_size: int = setting(0, "images: side in pixels; 0: that of the data", minimum=0, on_resume="never")
    image_channels: int = setting(
        0, "images: color channels, 1 or 3; 0: those of the data", minimum=0, maximum=3, on_resume="never"
    )

    @property
    def shape(self) -> str:
        """The blocks in words: "4 layers x 128 wide, 4 heads of 32, swiglu 352"."""
        layers = f"{counted(self.num_layers, 'layer')} x {self.hidden_size} wide"
        return f"{layers}, {self.num_heads} heads of {self.head_width}, {self.activation} {self.feed_forward_width}"

    @property
    def patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """``feed_forward_size``, or the usual multiple of ``hidden_size``, rounded up to a multiple of 32."""
        multiple = {"swiglu": 8 / 3, "relu2": 4}[self.activation]
        return self.feed_forward_size or -(-int(multiple * self.hidden_size) // 32) * 32
