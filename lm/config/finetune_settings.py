"""The settings of fine-tuning: its tasks, its methods, and how a task is read and learned."""

from __future__ import annotations

from dataclasses import dataclass

from lm.config.setting import setting

# The tasks of fine-tuning: those with a head of their own (``lm.finetuning.heads``), those of images, and all.
HEAD_TASKS = ("classification", "regression", "tokens", "choice", "image_classification")
IMAGE_TASKS = ("image_classification",)
TASKS = (*HEAD_TASKS, "instruction", "contrastive")
# The methods of fine-tuning, each with AdamW's default learning rate.
METHODS = {"full": 1e-3, "lora": 5e-3, "probe": 1e-2}
IMAGE_METHODS = METHODS | {"full": 3e-4}  # on images (docs/lab-notes.md)
# Passes over the examples where the user names none: more of fewer examples, if they are texts of a task with a head.
EPOCHS, MORE_EPOCHS, FEW_EXAMPLES = 3.0, 10.0, 10_000
# The matrices of a block that LoRA can adapt, by their names in it.
ATTENTION_MATRICES, FEED_FORWARD_MATRICES = ("query", "key", "value", "output"), ("gate", "up", "down")
LORA_MATRICES = ATTENTION_MATRICES + FEED_FORWARD_MATRICES


@dataclass(frozen=True)
class FinetuneConfig:
    """The task on which a pretrained run is fine-tuned; pretraining has no such section in its files."""

    task: str = setting(
        "none", "task to learn; none: pretraining", choices=("none", *TASKS), on_resume="never", of_task=True
    )
    base: str = setting("", "pretrained run that gives the weights, tokenizer and shape", on_resume="never")
    checkpoint: str = setting(
        "newest",
        "which weights of the pretrained run to start from: newest, best (in its validation), average (over its last "
        "steps, see average_last), or the number of a step",
        on_resume="never",
    )
    weights: str = setting(
        "pretrained", "initial weights; random: untrained", choices=("pretrained", "random"), on_resume="never"
    )
    train: str = setting(
        "",
        "training examples: .jsonl, .json, .csv, .tsv, .parquet, or hf:NAME[:SPLIT]; of images: a folder with a folder "
        "for each class, a .tar or .zip of such, .parquet, hf:NAME[:SPLIT], or a dataset made by data_prep images",
        on_resume="free",
        of_task=True,
    )
    validation: str = setting("", "examples to choose the best step by; empty: none", on_resume="free", of_task=True)
    text_column: str = setting("text", "column with the text, or the question of a choice", of_task=True)
    text_pair_column: str = setting(
        "auto", "column with the second text of a pair; auto: text_pair, if present; empty: no pairs", of_task=True
    )
    label_column: str = setting("label", "column with the answer", of_task=True)
    choices_column: str = setting(
        "choices", "choice: column with the list of choices, or several columns with one each, as in a,b,c"
    )
    words_column: str = setting("words", "tokens: column with the words, a list or text with spaces")
    tags_column: str = setting("tags", "tokens: column with the labels of the words")
    prompt_column: str = setting("prompt", "instruction: column with what the user says")
    response_column: str = setting("response", "instruction: column with what the model should say")
    chat_template: str = setting("", "instruction: file with a Jinja chat template; empty: User: and Assistant: turns")
    template_tokens: str = setting(
        "characters",
        "instruction: what the chat template's names of special tokens become: the tokens, or their characters, as in "
        "runs of earlier versions; auto: the tokens, but a resumed run keeps what it has",
        choices=("auto", "special", "characters"),
        on_resume="never",
        finetuning="auto",
    )
    reads: str = setting(
        "auto",
        "attention over the texts; auto: bidirectional if the base was trained to fill masks, else causal",
        choices=("auto", "bidirectional", "causal"),
    )
    pooling: str = setting(
        "auto",
        "vector of a text: the mean of its tokens' hidden states, or the last one; auto: mean with bidirectional "
        "attention, else last",
        choices=("auto", "mean", "last"),
    )
    head_bias: str = setting(
        "true",
        "whether a constant is added to what the head computes; auto: unless a classifier reads the last token of "
        "causal attention, where those of transformers have none",
        choices=("auto", "true", "false"),
        on_resume="never",
        finetuning="auto",
    )
    head_hidden: int = setting(
        0,
        "width of a hidden layer (GELU) in the head of a task, between a text's vector and its answers; 0: none",
        minimum=0,
        maximum=2**16,
        on_resume="never",
    )
    long_texts: str = setting(
        "truncate",
        "texts longer than the context: truncate keeps the beginning, window averages consecutive windows; pairs that "
        "are read together are always truncated, the longer text first",
        choices=("truncate", "window"),
    )
    pairs: str = setting(
        "apart",
        "pairs in classification or regression: apart: read each text by itself, and give the head both vectors, "
        "their difference and their product; together: read a pair as one document, in which each text sees the other; "
        "auto: learn one way after the other, and keep the one with the better validation",
        choices=("apart", "together", "auto"),
        on_resume="never",
    )
    method: str = setting(
        "full",
        "what is trained; full: all weights; lora: low-rank additions to matrices; probe: only the head",
        choices=tuple(METHODS),
        on_resume="never",
    )
    lora_rank: int = setting(8, "lora: rank of the additions", minimum=1, maximum=2**16, on_resume="never")
    lora_alpha: float = setting(16.0, "lora: additions are scaled by this / lora_rank", minimum=0, on_resume="never")
    lora_matrices: tuple[str, ...] = setting(
        LORA_MATRICES, "lora: matrices of each block to adapt", choices=LORA_MATRICES, on_resume="never"
    )
    lora_rate: str = setting(
        "fixed",
        f"lora: learning_rate if none is given; fixed: {METHODS['lora']:g}; scaled: that of full x sqrt(hidden_size / "
        "lora_rank) x lora_rank / lora_alpha, so that a step changes what a matrix computes about as much as in full",
        choices=("fixed", "scaled"),
        on_resume="never",
    )
    epochs: float = setting(
        EPOCHS,
        f"passes over the training examples; 0: {MORE_EPOCHS:g} over fewer than {FEW_EXAMPLES:,} texts of a task with "
        f"a head, else {EPOCHS:g}",
        minimum=0,
        maximum=1e6,
        on_resume="free",
        finetuning=0.0,
    )
    batch_examples: int = setting(32, "examples per optimizer step", minimum=1, maximum=2**30, on_resume="never")
    micro_batch_tokens: int = setting(
        4096,
        "most tokens per forward pass (at least one example is taken); without dropout it does not change the result",
        minimum=1,
        on_resume="free",
    )
    validations_per_epoch: float = setting(1.0, "validations per epoch", minimum=0.01, on_resume="free")
    patience: int = setting(
        0, "stop after this many validations in a row without a new best; 0: never", minimum=0, on_resume="free"
    )
    judged_by: str = setting(
        "auto",
        "metric that chooses the best validation; auto: accuracy; spearman for regression and contrastive; loss for "
        "instruction",
        choices=("auto", "loss", "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"),
        of_task=True,
    )
    class_weights: str = setting(
        "none", "weights of the classes in the loss; balanced: all classes count equally", choices=("none", "balanced")
    )
    temperature: float = setting(0.05, "contrastive: cosine similarities are divided by this", minimum=0.001)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", minimum=0, maximum=0.9)
