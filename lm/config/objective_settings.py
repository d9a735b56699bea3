"""The objectives, and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm.config.setting import setting, shares_of

if TYPE_CHECKING:
    from fractions import Fraction

# Each objective: the file of lm/objectives that makes it, and the readouts that a model can be asked for afterwards.
OBJECTIVES = {
    "next_token": ("text", ("next_token",)),
    "masked_token": ("text", ("masked_token",)),
    "masked_next_token": ("text", ("masked_next_token",)),
    "hybrid": ("text", ("next_token", "masked_next_token")),
    "hybrid_unshifted": ("text", ("next_token", "masked_token")),
    "prefix_lm": ("prefix_lm", ("next_token",)),
    "fill_in_the_middle": ("fill_in_the_middle", ("next_token",)),
    "span_corruption": ("span_corruption", ()),
    "diffusion": ("diffusion", ("masked_next_token",)),
    "simclr": ("simclr", ()),
    "moco": ("moco", ()),
    "byol": ("byol", ()),
    "dino": ("dino", ()),
    "dinov2": ("dinov2", ()),
    "mae": ("mae", ()),
    "beit": ("beit", ()),
}
# The objectives that learn from images, and those of them that learn from views, which text has too.
IMAGE_OBJECTIVES = ("simclr", "moco", "byol", "dino", "dinov2", "mae", "beit")
TEXT_VIEW_OBJECTIVES = ("simclr", "moco", "byol", "dino")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    objective: str = setting(
        "hybrid",
        "what the model learns; on text also several objectives, each with its share of a step's rows, at most one of "
        "which compares views: next_token:0.5,masked_next_token:0.25,simclr:0.25",
        choices=tuple(OBJECTIVES),
        mixture=True,
    )
    masked_fraction: float = setting(
        0.5, "hybrid objectives: share of the rows that are masked and read bidirectionally", minimum=0, maximum=1
    )
    final_masked_fraction: float = setting(
        -1.0,
        "masked_fraction in the last step, reached linearly; -1: masked_fraction",
        minimum=-1,
        maximum=1,
    )
    mask_rate: float = setting(0.3, "share of a masked row's tokens to predict", minimum=0.01, maximum=1)
    final_mask_rate: float = setting(
        -1.0, "mask_rate in the last step, reached linearly; -1: mask_rate", minimum=-1, maximum=1
    )
    mask_whole_words: bool = setting(
        False, "masked objectives: predict all tokens of a word or none of them; each token still with mask_rate"
    )
    mask_token_share: float = setting(0.8, "share of predicted tokens that become the mask token", minimum=0, maximum=1)
    random_token_share: float = setting(
        0.1, "share of predicted tokens that become a random token; the rest is unchanged", minimum=0, maximum=1
    )
    validation_mask_rate: float = setting(
        0.15, "share of the tokens hidden at once when validating the masked readout", minimum=0.01, maximum=1
    )

    longest_prefix: float = setting(
        1.0,
        "prefix_lm: the prefix of a document is drawn evenly between nothing and this share of it",
        minimum=0,
        maximum=1,
    )
    infill_rate: float = setting(
        0.5, "fill_in_the_middle: share of the documents that are cut in three and rearranged", minimum=0, maximum=1
    )
    suffix_first_rate: float = setting(
        0.5, "fill_in_the_middle: share of these that begin with the end of the document", minimum=0, maximum=1
    )
    span_corruption_rate: float = setting(
        0.15, "span_corruption: share of a document's tokens that are hidden", minimum=0.01, maximum=0.5
    )
    mean_span_length: float = setting(3.0, "span_corruption: mean number of tokens in a hidden span", minimum=1)
    span_attention: str = setting(
        "bidirectional",
        "span_corruption: how the text with gaps is read; the spans are always read causally",
        choices=("bidirectional", "causal"),
    )
    predict_ahead: int = setting(
        1,
        "next_token, hybrid objectives: how many of the next tokens each position of a causal row predicts, from the "
        "same hidden state by the same head",
        minimum=1,
        maximum=16,
    )
    ahead_weight: float = setting(
        0.5,
        "predict_ahead: weight of each token relative to the one before it, in the first step",
        minimum=0,
        maximum=1,
    )
    ahead_until: float = setting(
        0.667,
        "predict_ahead: share of the steps in which the weights of the tokens after the next one fall linearly to 0",
        minimum=0.001,
        maximum=1,
    )
    lowest_diffusion_rate: float = setting(
        0.001,
        "diffusion: the share of a row's tokens that is hidden is drawn evenly between this and 1",
        minimum=1e-6,
        maximum=1,
    )
    diffusion_passes: int = setting(
        8,
        "diffusion: how often kindling evaluate reads each row, at evenly spread rates, for the likelihood's bound",
        minimum=1,
        maximum=1000,
        on_resume="free",
    )

    infonce_temperature: float = setting(
        0.2, "simclr, moco: cosine similarities are divided by this", minimum=0.001, maximum=100
    )
    projection_size: int = setting(
        128, "simclr, moco, byol, dino, dinov2: width of the vectors that are compared", minimum=2, on_resume="never"
    )
    projection_hidden_size: int = setting(
        512, "simclr, moco, byol, dino, dinov2: width inside the projection head", minimum=2, on_resume="never"
    )
    queue_size: int = setting(
        0,
        "moco: the teacher's vectors of earlier steps that are compared too; 0: none (MoCo v3)",
        minimum=0,
        on_resume="never",
    )
    teacher_momentum: float = setting(
        0.99,
        "moco, byol, dino, dinov2: share of the teacher's weights that a step keeps; it rises to 1 along a cosine",
        minimum=0,
        maximum=1,
    )
    prototypes: int = setting(1024, "dino, dinov2: number of prototypes", minimum=2, on_resume="never")
    student_temperature: float = setting(0.1, "dino, dinov2: the student's scores are divided by this", minimum=0.001)
    teacher_temperature: float = setting(0.04, "dino, dinov2: the teacher's scores are divided by this", minimum=0.001)
    first_teacher_temperature: float = setting(
        0.04, "dino, dinov2: teacher_temperature at the start, from where it rises linearly", minimum=0.001
    )
    teacher_warmup: float = setting(
        0.1, "dino, dinov2: share of the steps after which teacher_temperature is reached", minimum=0, maximum=1
    )
    center_momentum: float = setting(
        0.9, "dino, dinov2: share of the center of the teacher's scores that a step keeps", minimum=0, maximum=1
    )
    prototypes_frozen: float = setting(
        0.01, "dino, dinov2: share of the steps, at the start, in which prototypes do not change", minimum=0, maximum=1
    )
    centering: str = setting(
        "auto",
        "dino, dinov2: what keeps the teacher from one prototype for all: mean subtracts a moving average, sinkhorn "
        "balances each batch; auto: mean for dino, sinkhorn for dinov2",
        choices=("auto", "mean", "sinkhorn"),
    )
    ibot_weight: float = setting(
        1.0, "dinov2: weight of the loss of patches (patch_mask_rate) that are hidden from the student", minimum=0
    )
    koleo_weight: float = setting(0.1, "dinov2: weight of the loss that spreads features out", minimum=0)
    local_views: int = setting(
        4, "dino, dinov2: smaller views of each image that only the student sees", minimum=0, maximum=64
    )
    local_size: int = setting(
        0, "dino, dinov2: side of the smaller views in pixels, a multiple of patch_size; 0: half the image's", minimum=0
    )
    local_area: float = setting(
        0.05,
        "dino, dinov2: smallest share of the image's area in a smaller view; the largest is crop_area",
        minimum=0.01,
        maximum=1,
    )
    patch_mask_rate: float = setting(
        0.75, "mae, beit: share of an image's patches that are hidden and predicted", minimum=0.01, maximum=0.99
    )
    visual_tokenizer: str = setting("", "beit: folder of visual tokens whose codes are predicted", on_resume="never")
    visual_codes: int = setting(
        0, "beit: number of codes; 0: those of visual_tokenizer", minimum=0, maximum=2**15, on_resume="never"
    )
    normalize_patches: bool = setting(
        True, "mae: predict the pixels of a patch after normalizing them by their own mean and variance"
    )
    decoder_layers: int = setting(2, "mae: blocks of the decoder", minimum=1, on_resume="never")
    decoder_size: int = setting(96, "mae: width of the decoder, in heads of 32", minimum=32, on_resume="never")

    @property
    def shares(self) -> dict[str, Fraction]:
        """The objectives that ``objective`` names, with their shares of the rows."""
        return shares_of(self.objective)

    @property
    def description(self) -> str:
        """``objective``, with the share of masked rows where it moves."""
        first, last = self.masked_fraction, self.final_masked_fraction
        moves = self.objective.startswith("hybrid") and last not in (-1, first)
        return f"{self.objective} ({first:.0%} to {last:.0%} of the rows masked)" if moves else self.objective

    def masking_at(self, step: int, steps: int) -> tuple[float, float]:
        """``masked_fraction`` and ``mask_rate`` in step ``step`` (from 0) of ``steps``."""
        passed = min(step, steps - 1) / max(1, steps - 1)
        pairs = ((self.masked_fraction, self.final_masked_fraction), (self.mask_rate, self.final_mask_rate))
        fraction, rate = (first if last < 0 else (1 - passed) * first + passed * last for first, last in pairs)
        return fraction, rate

    def ahead_at(self, step: int, steps: int) -> tuple[float, ...]:
        """The weights of the tokens after the next one in step ``step`` (from 0) of ``steps``; () if all are 0."""
        left = 1 - step / (self.ahead_until * steps)
        weights = (max(0.0, left) * self.ahead_weight**number for number in range(1, self.predict_ahead))
        return tuple(weight for weight in weights if weight)

    @property
    def validation_folds(self) -> int:
        """The number of passes in which a masked readout hides every token once."""
        return round(1 / self.validation_mask_rate)
