"""The command line: ``kindling train``, ``sample``, ``evaluate``, … and the same commands as scripts.

PyTorch is imported inside the commands, so that ``--help`` and a mistyped setting answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli import main as prep
from data_prep.command_line import USER_ERROR_STATUS, FriendlyCommand, FriendlyGroup
from data_prep.errors import UserError
from lm import __version__
from lm.config import Config, all_settings
from lm.recipes import find_recipe, load_config

if TYPE_CHECKING:
    from lm.checkpoint import Checkpoint
    from lm.config import Config
    from lm.generate import Sampling
    from lm.model import Transformer
    from lm.run_directory import Run


@click.group(cls=FriendlyGroup)
@click.version_option(__version__, prog_name="kindling")
def main() -> None:
    """Pretrain a small language model on your own text, and use it."""


main.add_command(prep, "prep")

run_argument = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
checkpoint_option = click.option(
    "--checkpoint",
    "which",
    default="newest",
    show_default=True,
    metavar="newest|best|STEP",
    help="Which of the run's checkpoints: the newest, that of the best validation, or the one of a step.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every setting of a recipe, explained from the dataclass that defines it."""
    for setting in reversed(list(all_settings())):
        limits = f"; one of {', '.join(setting.choices)}" if setting.choices else ""
        default = json.dumps(setting.default) if setting.default not in ("", ()) else "none"
        text = f"[{setting.section}] {setting.help}{limits}. [default: {default}]"
        repeated = " May be repeated." if setting.kind == "list of texts" else ""
        function = click.option(
            setting.option,
            setting.name,
            metavar=setting.kind.upper(),
            default=None,
            multiple=bool(repeated),
            help=text + repeated,
        )(function)
    return function


def is_one_of_several() -> bool:
    """Whether torchrun started several processes with this command (``lm.distributed``, which needs PyTorch)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@main.command(
    cls=FriendlyCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110},
)
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path),
    help="Run directory to write. Default: runs/NAME-OF-THE-RECIPE.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run even if settings of its training have changed (not its shape or data); "
    "without a RECIPE, with the settings it has. An unchanged command goes on by itself.",
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Print what the run would need (parameters, memory by part, a dry step's speed, time to the end) and write "
    "nothing. Without --data, give --vocab-size.",
)
@json_option
@settings_options
@click.pass_context
def train(
    context: click.Context,
    recipe: str | None,
    run_path: Path | None,
    resume: bool,
    plan_only: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Pretrain a model: RECIPE is a TOML file such as configs/tiny.toml, or the name of one that comes with Kindling.

    Any setting of the recipe can be given here by its name; the defaults below hold where the recipe says nothing. The
    same command goes on where a run was stopped.
    """
    try:
        config, run_path = _config_and_run(recipe, run_path, settings, context.args)
    except UserError:
        if is_one_of_several():  # all meet the same mistake, and one tells it
            from lm.distributed import leave_unless_first

            leave_unless_first(USER_ERROR_STATUS)
        raise
    if plan_only:
        _print_plan(config, run_path, as_json)
        return

    from lm.evaluate import saved_evaluation
    from lm.progress import TerminalProgress
    from lm.report import write_report
    from lm.trainer import train as train_run

    run = train_run(config, run_path, TerminalProgress(), accept_changes=resume)
    if is_one_of_several() and os.environ["RANK"] != "0":
        return
    report, newest = run_path / "report.html", run.latest()
    if newest and not (report.exists() and report.stat().st_mtime >= newest.path.stat().st_mtime):
        write_report(run, saved_evaluation(run, newest), run.config.report.prompts, run.config.report.fills)
    if as_json:
        last = [line for line in run.metrics() if "validation" in line][-1:]
        click.echo(json.dumps({"run": str(run_path), **(last[0] if last else {})}))
    click.echo(f"{run_path} is ready, with {report}; next: python evaluate.py {run_path}", err=True)


def _config_and_run(
    recipe: str | None, run_path: Path | None, settings: dict[str, Any], extra_arguments: list[str]
) -> tuple[Config, Path]:
    """The settings that a command line of ``train`` asks for, and where their run lies.

    Raises:
        UserError: a setting or an argument is wrong, or there is nothing to go on with.
    """
    if recipe is None and run_path is None:
        raise UserError("name a recipe to train (configs/tiny.toml, say), or a run to go on with: --run RUN --resume")
    extras = [*([recipe] if recipe and recipe.startswith("-") else []), *extra_arguments]
    unknown = tuple(extra.split("=")[0] for extra in extras if extra.startswith("-"))
    if recipe in extras:
        recipe = None  # an unknown option stood before the recipe and took its place
    if run_path is None:
        run_path = Path("runs") / Path(str(recipe)).stem
    saved = run_path / "config.toml"
    before = load_config(saved) if saved.is_file() else None
    # The rows of a micro-batch may have been chosen, for the batch as it was: the run goes on with them if they fit.
    base = before and before.replace(micro_batch_rows=0)
    if recipe is None and base is None and not unknown:
        raise UserError(
            f"{run_path} is not a run directory yet: name a recipe to begin it with (configs/tiny.toml, say)"
        )
    given = {
        name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
        for name, value in settings.items()
        if value not in (None, ())
    }
    config = load_config(find_recipe(recipe) if recipe else None, given, unknown_options=unknown, base=base)
    if extras:
        raise UserError(f"unexpected argument {extras[0]!r}")
    return config, run_path


def _print_plan(config: Config, run_path: Path, as_json: bool) -> None:
    from lm.plan import plan_run
    from lm.trainer import told_memory

    saved = run_path / "config.toml"
    with told_memory():
        plan = plan_run(config, load_config(saved) if saved.is_file() else None)
    if as_json:
        click.echo(json.dumps(plan.as_dict()))
        return
    width = max(len(name) for name, _ in plan.table())
    for name, value in plan.table():
        click.echo(f"{name:{width}}  {value}")


@main.command(cls=FriendlyCommand)
@run_argument
@click.option("--prompt", "prompts", multiple=True, help='Text to continue; may be repeated. "" begins a new text.')
@click.option(
    "--fill", "fills", multiple=True, help="Text in which each [MASK] is filled with one token; may be repeated."
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    help="Below 1: safer, above: wilder, 0: always the likeliest token.",
)
@click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0: from all.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that together reach this probability.",
)
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    help="Leave out tokens less than this many times as likely as the likeliest.",
)
@click.option("--max-new-tokens", default=200, show_default=True, help="Tokens to write at most.")
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same text.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where to compute.",
)
@checkpoint_option
@json_option
def sample(
    run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], device: str, which: str, as_json: bool, **sampling: Any
) -> None:
    """Write with the model of RUN: continue prompts, fill masks. The text alone goes to stdout."""
    from lm.generate import Sampling
    from lm.run_directory import choose_device, open_run

    settings = Sampling(**sampling)
    if problems := settings.problems():
        raise UserError("\n".join(problems))
    if not prompts and not fills:
        raise UserError('nothing to do: give --prompt "Once upon a time", or --fill "The [MASK] sat on the mat."')
    opened = open_run(run)
    _check_readouts(opened, prompts, fills)
    model = opened.load_model(choose_device(device), opened.checkpoint(which))
    for number, prompt in enumerate(prompts):
        if number and not as_json:
            click.echo()
        _continue(opened, model, prompt, settings, as_json)
    for text in fills:
        _fill(opened, model, text, as_json)


def _check_readouts(run: Run, prompts: tuple[str, ...], fills: tuple[str, ...]) -> None:
    from lm.objectives import READOUTS

    objective = run.config.objective.objective
    if prompts and "next_token" not in READOUTS[objective]:
        raise UserError(
            f"{run.path} was trained with {objective} only: it can fill masks (--fill), but not continue a prompt"
        )
    if fills and READOUTS[objective][-1] == "next_token":
        raise UserError(
            f"{run.path} was trained with {objective} only: it can continue a prompt (--prompt), but not fill masks"
        )


def _continue(run: Run, model: Transformer, prompt: str, sampling: Sampling, as_json: bool) -> None:
    from lm.generate import continue_text

    pieces = continue_text(model, run.tokenizer, prompt, sampling, run.config.data.context_length)
    if as_json:
        click.echo(json.dumps({"prompt": prompt, "continuation": "".join(pieces)}, ensure_ascii=False))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _fill(run: Run, model: Transformer, text: str, as_json: bool) -> None:
    from lm.generate import fill_masks
    from lm.objectives import READOUTS

    readout = READOUTS[run.config.objective.objective][-1]
    filled = fill_masks(model, run.tokenizer, text, readout, run.config.data.context_length)
    if as_json:
        told = [[{"token": t, "probability": round(p, 6)} for t, p in mask] for mask in filled.candidates]
        click.echo(json.dumps({"fill": text, "filled": filled.text, "candidates": told}, ensure_ascii=False))
        return
    click.echo(filled.text)
    for candidates in filled.candidates:
        click.echo(
            "    " + "  ".join(f"{token.strip()} {probability:.0%}" for token, probability in candidates), err=True
        )


@main.command(cls=FriendlyCommand)
@run_argument
@click.option("--data", default="", help="Folder of token shards to evaluate on. Default: the run's own.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Minimal pairs instead of the loss: a .jsonl, .csv or .tsv file, or a folder of them (BLiMP).",
)
@click.option(
    "--columns",
    nargs=2,
    default=("sentence_good", "sentence_bad"),
    show_default=True,
    help="The pairs' columns: the acceptable sentence, the other.",
)
@click.option(
    "--ties",
    type=click.Choice(["half", "first"]),
    default="half",
    show_default=True,
    help="What a pair of equally likely sentences scores; first: 1, as is usual and flattering.",
)
@checkpoint_option
@json_option
def evaluate(
    run: Path, data: str, pairs: Path | None, columns: tuple[str, str], ties: str, which: str, as_json: bool
) -> None:
    """Loss of RUN over the whole validation split, for each way it reads, in nats per token and bits per byte.

    Beside it stand floors: what the frequency of tokens, and bz2 -9, reach on the same text. With --pairs: how often
    it finds the acceptable one of two sentences likelier.
    """
    from lm.evaluate import evaluate as evaluate_run
    from lm.run_directory import open_run

    opened = open_run(run)
    if pairs is not None:
        _evaluate_pairs(opened, opened.checkpoint(which), pairs, columns, ties, as_json)
        return
    result = evaluate_run(opened, data, opened.checkpoint(which))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "nats per token", "bits per byte", box=None, pad_edge=False)
    for losses, kind in ((result["validation"], ""), (result["floors"], " (floor)")):
        for name, loss in losses.items():
            nats = "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.4f}"
            table.add_row(name + kind, nats, f"{loss['bits_per_byte']:.4f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"step {result['step']:,}; {result['validation_tokens']:,} tokens, {result['validation_bytes']:,} bytes of "
        f"{result['data']}; {result['protocol']}",
        markup=False,
    )


def _evaluate_pairs(
    run: Run, checkpoint: Checkpoint, path: Path, columns: tuple[str, str], ties: str, as_json: bool
) -> None:
    from lm import minimal_pairs
    from lm.run_directory import choose_device

    paradigms = minimal_pairs.read_pairs(path, columns)
    model = run.load_model(choose_device("auto"), checkpoint)
    results = minimal_pairs.evaluate_run(
        run, model, paradigms, ties=ties, progress=lambda text: click.echo(text, err=True)
    )
    if as_json:
        told = {name: {key: value.as_dict() for key, value in each.items()} for name, each in results.items()}
        click.echo(json.dumps({"ties": ties, "accuracy": told}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *results, box=None, pad_edge=False)
    for name in next(iter(results.values())):
        found = [each[name] for each in results.values()]
        table.add_row(name, *(f"{result.mean:.1%} ± {result.error:.1%}" for result in found))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    equal = ", ".join(f"{name} {each['all'].ties:,}" for name, each in results.items())
    console.print(
        f"share of pairs whose acceptable sentence is the likelier one, ± bootstrap error; temperature 1; ties score "
        f"{ties} (of {next(iter(results.values()))['all'].pairs:,}: {equal}); all: the mean over paradigms",
        markup=False,
    )


@main.command(cls=FriendlyCommand)
@run_argument
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to show the continuation of; may be repeated. Default: the recipe's prompts.",
)
@click.option(
    "--fill",
    "fills",
    multiple=True,
    help="Text with [MASK] to show filled; may be repeated. Default: the recipe's fills.",
)
@checkpoint_option
def report(run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], which: str) -> None:
    """Write RUN/report.html: losses, curves, samples, settings, environment; one file that needs no network."""
    from lm.evaluate import saved_evaluation
    from lm.report import write_report
    from lm.run_directory import open_run

    opened = open_run(run)
    defaults, saved = opened.config.report, opened.checkpoint(which)
    evaluation = saved_evaluation(opened, saved)
    path = write_report(opened, evaluation, prompts or defaults.prompts, fills or defaults.fills, saved)
    click.echo(str(path))


@main.command(cls=FriendlyCommand)
@click.argument("runs", metavar="RUN_A RUN_B [MORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="compare.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Page to write: the numbers, the curves over one another, the settings that differ; it needs no network.",
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put runs beside one another: where they stand, what differs in their settings, their curves in one picture.

    Runs that are still training can be compared too.
    """
    from lm.compare import compare as compare_runs
    from lm.compare import differences, open_entries, rows, write_comparison

    entries = open_entries(runs)
    comparison = compare_runs(entries)
    write_comparison(entries, comparison, out)
    if as_json:
        click.echo(json.dumps(comparison))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *numbers = rows(comparison)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(name), no_wrap=number == 0, overflow="fold")
    for row in numbers:
        table.add_row(*map(Text, row))
    for row in differences(comparison):
        table.add_row(*map(Text, row), style="dim")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for remark in comparison["remarks"]:
        console.print(remark, markup=False)
    click.echo(str(out), err=True)


@main.command(cls=FriendlyCommand)
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
    from lm.export import choose_readout, export_huggingface
    from lm.export_gguf import export_gguf
    from lm.run_directory import open_run

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


@main.command("import", cls=FriendlyCommand)
@click.argument("source", metavar="FOLDER_OR_NAME")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Run directory to write.")
def import_run(source: str, run: Path) -> None:
    """Make a run directory of a Llama, Qwen3 or EuroBERT checkpoint: a folder, or a name on the Hugging Face hub."""
    from lm.import_checkpoint import import_checkpoint

    import_checkpoint(source, run)
    click.echo(str(run))
    click.echo(f"next: python sample.py {run} --prompt …, or evaluate.py {run} --data …", err=True)
