"""The settings of views of images and of texts."""

from __future__ import annotations

from dataclasses import dataclass

from lm.config.setting import setting


@dataclass(frozen=True)
class ViewsConfig:
    """How views are drawn; each image, or piece of text, and each of its views has draws of its own."""

    crop_area: float = setting(
        0.2, "smallest share of the image's area in a crop", minimum=0.01, maximum=1, finetuning=0.6
    )
    largest_crop: float = setting(1.0, "largest share of the image's area in a crop", minimum=0.01, maximum=1)
    crop_ratio: float = setting(1.33, "largest ratio of a crop's sides, either way", minimum=1, maximum=10)
    flip: float = setting(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    color_jitter: float = setting(
        0.5,
        "strength of color changes: brightness, contrast and saturation by up to 0.8 times this, hue by up to 0.2 "
        "times this (not mae, beit)",
        minimum=0,
        maximum=1.25,
        finetuning=0.0,
    )
    color_jitter_rate: float = setting(0.8, "probability of color changes (not mae, beit)", minimum=0, maximum=1)
    grayscale: float = setting(
        0.2, "probability of a view without color (not mae, beit)", minimum=0, maximum=1, finetuning=0.0
    )
    blur: float = setting(
        0.5,
        "probability of Gaussian blur in views of at least 64 pixels (not mae, beit)",
        minimum=0,
        maximum=1,
        finetuning=0.0,
    )
    first_blur: float = setting(
        0.0, "probability of blur in the first of two views, added to that of blur", minimum=0, maximum=1
    )
    solarize: float = setting(
        0.0,
        "probability of inverting the pixels above one half (not mae, beit)",
        minimum=0,
        maximum=1,
        finetuning=0.0,
    )
    second_solarize: float = setting(
        0.0,
        "probability of solarization in the second of two views, added to that of solarize (BYOL, DINO: 0.2)",
        minimum=0,
        maximum=1,
    )
    view_tokens: int = setting(
        64,
        "text: largest number of tokens of a piece; views are views of a piece, which is a document or an equal part "
        "of one",
        minimum=2,
        on_resume="never",
        pretraining_only=True,
    )
    span_share: float = setting(
        0.5,
        "text: smallest share of a piece's tokens in a view, which is a span of them; 1: all",
        minimum=0.01,
        maximum=1,
        pretraining_only=True,
    )
    token_deletion: float = setting(
        0.1, "text: share of a view's tokens that are left out", minimum=0, maximum=0.9, pretraining_only=True
    )
