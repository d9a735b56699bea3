"""The command line: ``kindling train | sample | evaluate | report | prep``, and the same commands as scripts.

PyTorch is imported inside the commands, so that ``--help`` and a mistyped setting answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli import main as prep
from data_prep.command_line import FriendlyCommand, FriendlyGroup
from data_prep.errors import UserError
from lm import __version__
from lm.config import Config, all_settings
from lm.recipes import find_recipe, load_config

if TYPE_CHECKING:
    from lm.generate import Sampling
    from lm.model import Transformer
    from lm.run_directory import Run


@click.group(cls=FriendlyGroup)
@click.version_option(__version__, prog_name="kindling")
def main() -> None:
    """Pretrain a small language model on your own text, and use it."""


main.add_command(prep, "prep")

run_argument = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
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
    if recipe is None and run_path is None:
        raise UserError("name a recipe to train (configs/tiny.toml, say), or a run to go on with: --run RUN --resume")
    extras = [*([recipe] if recipe and recipe.startswith("-") else []), *context.args]
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

    if plan_only:
        _print_plan(config, before, as_json)
        return
    from lm.evaluate import saved_evaluation
    from lm.progress import TerminalProgress
    from lm.report import write_report
    from lm.trainer import train as train_run

    run = train_run(config, run_path, TerminalProgress(), accept_changes=resume)
    report, newest = run_path / "report.html", run.latest()
    if newest and not (report.exists() and report.stat().st_mtime >= newest.path.stat().st_mtime):
        write_report(run, saved_evaluation(run), run.config.report.prompts, run.config.report.fills)
    if as_json:
        last = [line for line in run.metrics() if "validation" in line][-1:]
        click.echo(json.dumps({"run": str(run_path), **(last[0] if last else {})}))
    click.echo(f"{run_path} is ready, with {report}; next: python evaluate.py {run_path}", err=True)


def _print_plan(config: Config, before: Config | None, as_json: bool) -> None:
    from lm.plan import plan_run
    from lm.trainer import told_memory

    with told_memory():
        plan = plan_run(config, before)
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
@json_option
def sample(
    run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], device: str, as_json: bool, **sampling: Any
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
    model = opened.load_model(choose_device(device))
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
@json_option
def evaluate(run: Path, data: str, as_json: bool) -> None:
    """Loss of RUN over the whole validation split, for each way it reads, in nats per token and bits per byte.

    Beside it stand floors: what the frequency of tokens, and bz2 -9, reach on the same text.
    """
    from lm.evaluate import evaluate as evaluate_run
    from lm.run_directory import open_run

    result = evaluate_run(open_run(run), data)
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
def report(run: Path, prompts: tuple[str, ...], fills: tuple[str, ...]) -> None:
    """Write RUN/report.html: losses, curves, samples, settings, environment; one file that needs no network."""
    from lm.evaluate import saved_evaluation
    from lm.report import write_report
    from lm.run_directory import open_run

    opened = open_run(run)
    defaults = opened.config.report
    path = write_report(opened, saved_evaluation(opened), prompts or defaults.prompts, fills or defaults.fills)
    click.echo(str(path))
