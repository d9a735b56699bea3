"""``kindling export``, ``import`` and ``merge``: models for other programs, from them, and with plain weights."""

from __future__ import annotations

from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from lm.cli.options import best_checkpoint_option, checkpoint_option, run_argument


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--to", "kind", required=True, type=click.Choice(["hf", "gguf"]), help="transformers, or llama.cpp.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder (hf) or file (gguf) to write.")
@click.option(
    "--readout",
    type=click.Choice(["next_token", "masked_token", "masked_next_token"]),
    help="How the exported model reads. Default: the first of the run's that can be exported.",
)
@checkpoint_option
def export(run: Path, kind: str, out: Path, readout: str | None, which: str) -> None:
    """Write the model of RUN so that other programs load it, without any code of ours."""
    from lm.export.gguf import export_gguf
    from lm.export.huggingface import choose_readout, export_huggingface
    from lm.runs.directory import open_run

    opened = open_run(run)
    chosen = choose_readout(opened, readout)
    write = {"hf": export_huggingface, "gguf": export_gguf}[kind]
    write(opened, out, opened.checkpoint(which), chosen)
    click.echo(str(out))
    loaded = {
        ("hf", "next_token"): f'transformers.AutoModelForCausalLM.from_pretrained("{out}")',
        ("hf", "masked_token"): f'transformers.AutoModelForMaskedLM.from_pretrained("{out}")',
        ("gguf", "next_token"): f"llama-cli -m {out}",
    }
    click.echo(f"reads {chosen}; load it with: {loaded[kind, chosen]}", err=True)


@click.command("import", cls=FriendlyCommand)
@click.argument("source", metavar="FOLDER_OR_NAME")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
def import_run(source: str, run: Path) -> None:
    """Make a run directory of a Llama, Qwen3 or EuroBERT checkpoint: a folder, or a name on the Hugging Face hub."""
    from lm.export.import_huggingface import import_checkpoint

    import_checkpoint(source, run)
    click.echo(str(run))
    click.echo(f"next: python sample.py {run} --prompt …, or evaluate.py {run} --data …", err=True)


@click.command("merge", cls=FriendlyCommand)
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
@click.option("--trunk-only", is_flag=True, help="Leave the task's head out: a plain run, to export or to sample from.")
@best_checkpoint_option
def merge_run(run: Path, out: Path, trunk_only: bool, which: str) -> None:
    """Make plain weights of a fine-tuned RUN: what LoRA has added becomes part of its matrices, bit for bit."""
    from lm.finetuning.merge import merge
    from lm.runs.directory import open_run

    opened = open_run(run)
    merge(opened, out, opened.checkpoint(which), trunk_only=trunk_only)
    click.echo(str(out))
