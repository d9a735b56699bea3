"""``kindling export``, ``import`` and ``merge``: export models, import checkpoints, and merge LoRA weights."""

from __future__ import annotations

from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from lm.cli.options import best_checkpoint_option, checkpoint_option, run_argument


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--to", "kind", required=True, type=click.Choice(["hf", "gguf"]), help="transformers or llama.cpp.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder (hf) or file (gguf) to write.")
@click.option(
    "--readout",
    type=click.Choice(["next_token", "masked_token", "masked_next_token"]),
    help="Readout of the exported model. Default: the first of the run's readouts that can be exported.",
)
@checkpoint_option
def export(run: Path, kind: str, out: Path, readout: str | None, which: str) -> None:
    """Export the model of RUN for transformers or llama.cpp, which load it without Kindling's code."""
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
    click.echo(f"readout {chosen}; load it with: {loaded[kind, chosen]}", err=True)


@click.command("import", cls=FriendlyCommand)
@click.argument("source", metavar="FOLDER_OR_NAME")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
@click.option("--add-mask", is_flag=True, help="Add a mask token, for training with a masked objective.")
def import_run(source: str, run: Path, add_mask: bool) -> None:
    """Import a Llama, Mistral, Qwen3 or EuroBERT checkpoint as a run: a folder, or a name on the Hugging Face hub."""
    from lm.export.import_huggingface import import_checkpoint

    import_checkpoint(source, run, add_mask=add_mask, note=lambda text: click.echo(f"note: {text}", err=True))
    click.echo(str(run))
    click.echo(f"next: python sample.py {run} --prompt …, or evaluate.py {run} --data …", err=True)


@click.command("merge", cls=FriendlyCommand)
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
@click.option("--trunk-only", is_flag=True, help="Drop the task's head: a plain run, to export or to sample from.")
@best_checkpoint_option
def merge_run(run: Path, out: Path, trunk_only: bool, which: str) -> None:
    """Merge the LoRA weights of a fine-tuned RUN into its matrices; the outputs stay the same, bit for bit."""
    from lm.finetuning.merge import merge
    from lm.runs.directory import open_run

    opened = open_run(run)
    merge(opened, out, opened.checkpoint(which), trunk_only=trunk_only)
    click.echo(str(out))
