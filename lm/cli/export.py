"""``kindling export``, ``import`` and ``merge``: export models, import checkpoints, and merge LoRA weights."""

from __future__ import annotations

from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import require_new_folder
from lm.cli.options import best_checkpoint_option, run_argument, usual_command


@click.command(
    cls=FriendlyCommand,
    short_help="Export a model for transformers or llama.cpp.",
    sections=(
        Section("Export", "kind out readout outtype which"),
        Section("sentence-transformers", "", "reads pooling normalize"),
        Section("Model card", "license language base_model"),
        Section("Hugging Face hub", "push private"),
    ),
)
@run_argument
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice(["hf", "gguf", "sentence-transformers", "peft"]),
    help="transformers, llama.cpp, sentence-transformers, or a LoRA adapter for PEFT.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; gguf: file.")
@click.option(
    "--readout",
    type=click.Choice(["next_token", "masked_token", "masked_next_token"]),
    help="Readout of the exported model. Default: the first of the run's readouts that can be exported. "
    "masked_next_token is for programs that read its logits shifted, such as BabyLM's mntp backend and LLM2Vec.",
)
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Type of the matrices in a GGUF file. [default: f32]",
)
@click.option(
    "--reads",
    type=click.Choice(["causal", "bidirectional"]),
    help="sentence-transformers: attention, as in kindling embed. [default: as the run reads texts]",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    help="sentence-transformers: mean over a text's tokens, or its last one. [default: as in kindling embed]",
)
@click.option("--normalize", is_flag=True, help="sentence-transformers: scale each vector to length 1.")
@click.option("--license", default="", metavar="ID", help="License in the model card, such as mit or apache-2.0.")
@click.option("--language", multiple=True, metavar="CODE", help="Language in the model card, such as de; repeatable.")
@click.option("--base-model", default="", metavar="NAME", help="Model on the hub that this one was made from.")
@click.option("--push", default="", metavar="USER/NAME", help="Upload the export to the Hugging Face hub as well.")
@click.option("--private", is_flag=True, help="With --push: a repository that only you can see.")
@click.option(
    "--checkpoint",
    "which",
    metavar="newest|best|average|STEP",
    help="Checkpoint to export; average is the mean of the last weights (setting average_last). "
    "[default: the newest; the best one of a run with a task's head]",
)
def export(
    run: Path,
    kind: str,
    out: Path,
    readout: str | None,
    outtype: str | None,
    reads: str | None,
    pooling: str | None,
    normalize: bool,
    license: str,
    language: tuple[str, ...],
    base_model: str,
    push: str,
    private: bool,
    which: str | None,
) -> None:
    """Export the model of RUN for transformers, llama.cpp, sentence-transformers or PEFT, which need no Kindling.

    \b
    kindling export runs/mine --to hf --out exported/mine
    kindling export runs/mine --to gguf --out mine.gguf
    """
    if (reads or pooling or normalize) and kind != "sentence-transformers":
        raise UserError("--reads, --pooling and --normalize are for --to sentence-transformers")
    if outtype and kind != "gguf":
        raise UserError("--outtype is for --to gguf; the weights of --to hf are float32")
    if private and not push:
        raise UserError("--private is for --push USER/NAME")
    from lm.config.recipes import require_language_model, require_text_model, run_config

    config = run_config(run)
    if config.reads_images and kind != "hf":
        raise UserError(f"--to {kind} is for models that read text, and {run} reads images: use --to hf")
    if kind == "peft" and (not config.is_finetuning or config.finetune.method != "lora"):
        raise UserError(f"{run} has no LoRA adapter: fine-tune with --method lora, or export with --to hf")
    if kind == "gguf" or (kind == "hf" and not config.reads_images and not config.has_task_head):
        require_language_model(run, config)
    elif kind == "sentence-transformers":
        require_text_model(run, config)
    if kind != "gguf":
        require_new_folder(out)
    elif out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    from lm import api
    from lm.export import choose_readout, hub
    from lm.export.gguf import require_gguf
    from lm.export.huggingface import left_out
    from lm.export.model_card import CardFacts, finetuned_settings, training_limits
    from lm.export.stock_architectures import auto_class, stock_class
    from lm.export.task_model import pipeline_of
    from lm.runs.directory import open_run

    facts = CardFacts(license, language, base_model, push)
    opened = open_run(run)
    by_readout = kind in ("hf", "gguf") and not config.has_task_head and not config.reads_images
    if readout and not by_readout:
        raise UserError("--readout is for language models, with --to hf or gguf")
    chosen = choose_readout(opened, readout) if by_readout else None
    if chosen:
        stock_class(config.model, chosen)  # refuses what no stock class computes
    if chosen and kind == "gguf":
        require_gguf(opened, chosen)
    if push:
        hub.check_push(push, private=private)
    model = api.load(opened, checkpoint=which, device="cpu")
    if config.reads_images:
        model.save_pretrained(out, facts=facts)
        loaded = f'transformers.AutoModel.from_pretrained("{out}"), pictures as in {out / "README.md"}'
    elif kind == "gguf":
        model.save_gguf(out, readout=chosen, outtype=outtype or "f32", facts=facts)
        loaded = f"llama-cli -m {out}"
    elif kind == "peft":
        model.save_adapter(out, facts=facts)
        loaded = f'peft.PeftModel.from_pretrained(base, "{out}"), base as in {out / "README.md"}'
    elif kind == "sentence-transformers":
        model.save_sentence_transformer(out, reads=reads, pooling=pooling, normalize=normalize, facts=facts)
        loaded = f'sentence_transformers.SentenceTransformer("{out}")'
    elif chosen is None:
        model.save_pretrained(out, facts=facts)
        loaded = f'transformers.pipeline("{pipeline_of(opened.config.finetune.task)}", "{out}")'
    else:
        model.save_pretrained(out, readout=chosen, facts=facts)
        loaded = f'transformers.{auto_class(chosen)}.from_pretrained("{out}")'
    click.echo(str(out))
    click.echo(f"left out: {', '.join(left_out(opened, model.saved, out))}", err=True)
    click.echo(f"{f'readout {chosen}; ' if chosen else ''}load it with: {loaded}", err=True)
    if chosen == "masked_next_token":
        click.echo("the logits at position i predict token i+1: for a mask at i, take the logits at i-1", err=True)
    if chosen and (tuned := finetuned_settings(opened, model.saved)) and tuned["task"] != "instruction":
        click.echo(f"warning: {' '.join(training_limits(opened, model.saved))}", err=True)
    if push:
        click.echo(hub.push(out, push, private=private))


@click.command("import", cls=FriendlyCommand, short_help="Import a Llama, Mistral, Qwen3 or EuroBERT checkpoint.")
@click.argument("source", metavar="FOLDER_OR_NAME")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
@click.option("--add-mask", is_flag=True, help="Add a mask token, for training with a masked objective.")
def import_run(source: str, run: Path, add_mask: bool) -> None:
    """Import a Llama, Mistral, Qwen3 or EuroBERT checkpoint as a run: a folder, or a name on the Hugging Face hub."""
    require_new_folder(run, "--run")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} has no config.json: name the folder of a checkpoint")
    from lm.export.import_huggingface import import_checkpoint

    import_checkpoint(source, run, add_mask=add_mask, note=lambda text: click.echo(f"note: {text}", err=True))
    click.echo(str(run))
    click.echo(f"next: {command('sample')} {run} --prompt …, or {command('evaluate')} {run} --data …", err=True)


@click.command("merge", cls=FriendlyCommand, short_help="Make plain weights of a fine-tuned run.")
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
@click.option("--trunk-only", is_flag=True, help="Drop the task's head: a plain run, to export or to sample from.")
@best_checkpoint_option
def merge_run(run: Path, out: Path, trunk_only: bool, which: str) -> None:
    """Merge the LoRA weights of a fine-tuned RUN into its matrices; the outputs stay the same, bit for bit."""
    from lm.config.recipes import run_config

    config = run_config(run)
    if not config.is_finetuning:
        raise UserError(f"{run} is not fine-tuned: its weights are plain already")
    require_new_folder(out)
    from lm.finetuning.merge import merge
    from lm.runs.directory import open_run

    opened = open_run(run)
    merge(opened, out, opened.checkpoint(which), trunk_only=trunk_only)
    click.echo(str(out))
    click.echo(f"next: {usual_command(out, open_run(out).config)}", err=True)
