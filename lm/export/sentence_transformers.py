"""Export a model as a folder for sentence-transformers, whose vectors are those of ``kindling embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import new_folder
from lm.export.huggingface import write_card, write_json
from lm.export.model_card import NO_FACTS, CardFacts, finetuned_settings, model_card
from lm.export.stock_architectures import reading_class
from lm.export.stock_trunk import refuse_other_tokens, trunk_config, trunk_weights, write_trunk
from lm.inference.embedding import Reading
from lm.model.transformer import Transformer
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run

POOLINGS = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
OTHER_POOLINGS = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
SNIPPET = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(<where>)
vectors = model.encode(["One text", "and another"])
print(model.similarity(vectors, vectors))
"""


def export_sentence_transformers(
    run: Run, out: Path, checkpoint: Checkpoint, model: Transformer, reading: Reading, facts: CardFacts = NO_FACTS
) -> None:
    """Write the model of a checkpoint to the folder ``out``: float32 weights, pooling, and ``reading.normalize``.

    Raises:
        UserError: no stock class reads texts this way, ``reading.layer`` is not the last one, the run has a task's
            head, or ``out`` is not empty.
    """
    if reading.layer != -1:
        raise UserError("sentence-transformers pools the last layer: leave --layer out")
    try:
        stock = reading_class(run.config.model, reading.reads)
    except UserError as problem:
        raise UserError(f"{run.path} cannot be exported to be read {reading.reads}: {problem}") from None
    refuse_other_tokens(run, 1)
    weights = trunk_weights(run.config, model.state_dict())
    content = trunk_config(run, stock, stock.sibling("Model"))
    modules = ["Transformer", "Pooling", *(["Normalize"] if reading.normalize else [])]
    folders = ["", *(f"{number}_{name}" for number, name in enumerate(modules[1:], 1))]
    pooling = {f"pooling_mode_{name}": False for name in OTHER_POOLINGS}
    pooling |= {key: name == reading.pooling for name, key in POOLINGS.items()}
    with new_folder(out) as folder:
        write_trunk(run, folder, content, weights)
        for name in folders[1:]:
            (folder / name).mkdir()
        write_json(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": run.config.model.hidden_size, **pooling, "include_prompt": True},
        )
        listed = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (name, path) in enumerate(zip(modules, folders, strict=True))
        ]
        write_json(folder / "modules.json", listed)
        length = {"max_seq_length": run.config.data.context_length, "do_lower_case": False}
        write_json(folder / "sentence_bert_config.json", length)
        prompts: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        write_json(folder / "config_sentence_transformers.json", prompts)
        write_card(run, folder, _card(run, checkpoint, reading, facts))


def _card(run: Run, checkpoint: Checkpoint, reading: Reading, facts: CardFacts) -> str:
    tuned = finetuned_settings(run, checkpoint)
    learned = tuned is not None and tuned["task"] == "contrastive"
    pooled = "the mean over its tokens" if reading.pooling == "mean" else "the state of its last token"
    length = ", scaled to length 1" if reading.normalize else ""
    untrained = "It was not trained to embed sentences: contrastive training makes better vectors."
    return model_card(
        run,
        checkpoint,
        model="A sentence-transformers model",
        pipeline_tag="sentence-similarity",
        library="sentence-transformers",
        tags=["sentence-transformers", "feature-extraction"],
        snippet=SNIPPET,
        facts=facts,
        notes=[f"A text is read {reading.reads}ly, and its vector is {pooled}{length}. It needs no prompt."],
        limits=["Its vectors are as good as its training."] if learned else [untrained],
    )
