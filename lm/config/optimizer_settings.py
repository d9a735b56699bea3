"""The settings of the optimizer and its schedules."""

from __future__ import annotations

from dataclasses import dataclass

from lm.config.finetune_settings import METHODS
from lm.config.setting import setting


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices inside the blocks and AdamW for the rest; adamw: AdamW for everything",
        choices=("muon", "adamw"),
        on_resume="never",
        finetuning="adamw",
    )
    learning_rate: float = setting(0.01, "peak learning rate of AdamW", minimum=0, finetuning=METHODS["full"])
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", minimum=0, finetuning=0.002)
    weight_decay: float = setting(
        0.1, "decoupled weight decay of the matrices, multiplied by the learning rate", minimum=0, finetuning=0.01
    )
    beta1: float = setting(0.9, "AdamW: decay of the mean gradient", minimum=0, maximum=0.9999)
    beta2: float = setting(
        0.95, "AdamW: decay of the mean squared gradient", minimum=0, maximum=0.99999, finetuning=0.98
    )
    final_weight_decay: float = setting(
        1.0,
        "weight decay at the end, as a multiple of weight_decay, reached along a cosine (DINO: 10)",
        minimum=0,
        finetuning=1.0,
    )
    embedding_weight_decay: float = setting(
        0.0,
        "decoupled weight decay of the token embedding and of its head, multiplied by the learning rate of AdamW; it "
        "follows final_weight_decay too",
        minimum=0,
        pretraining_only=True,
    )
    cautious_weight_decay: bool = setting(
        False, "decay only weights that the update brings closer to zero (Chen et al. 2025, cautious weight decay)"
    )
    stem_learning_rate: float = setting(
        1.0, "learning rate of the embedding, or of the patch embedding, as a multiple of the others'", minimum=0
    )
    head_learning_rate: float = setting(
        1.0,
        "learning rate of the head of an objective on images or views, or of a task, as a multiple of the others'",
        minimum=0,
    )
    layer_decay: float = setting(
        1.0,
        "learning rate of each block as a share of that of the block above it",
        minimum=0.1,
        maximum=1,
        once_in="finetune",
    )
    momentum: float = setting(0.95, "Muon: decay of the momentum", minimum=0, maximum=0.9999)
    first_momentum: float = setting(
        0.85, "Muon: momentum at the start, from where it rises linearly", minimum=0, maximum=0.9999
    )
    momentum_warmup: float = setting(
        0.0, "Muon: share of the steps after which momentum is reached; 0: from the first step", minimum=0, maximum=1
    )
    muon_beta2: float = setting(
        0.0,
        "Muon: decay of the mean squared update of each row, by whose root the row is divided (NorMuon: 0.95); 0: off",
        minimum=0,
        maximum=0.9999,
        on_resume="never",
    )
    gradient_clip: float = setting(1.0, "largest norm of the whole gradient; 0: off", minimum=0)
    spike_threshold: float = setting(
        8.0, "skip a step whose loss is this many standard deviations above the running mean; 0: off", minimum=0
    )
    warmup_fraction: float = setting(
        0.02, "linear warmup, as a share of the steps", minimum=0, maximum=1, finetuning=0.1
    )
    decay_fraction: float = setting(
        0.7, "linear decay at the end, as a share of the steps", minimum=0, maximum=1, finetuning=0.9
    )
    final_learning_rate_fraction: float = setting(
        0.0, "learning rate at the end of the decay, as a share of the peak", minimum=0, maximum=1
    )
