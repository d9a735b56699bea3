"""``kindling sample``: generate text with a trained model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import UserError
from data_prep.errors.wording import counted
from data_prep.files import rename, require_new_file
from lm.cli.options import checkpoint_option, compile_option, device_option, json_option, run_argument, sampling_options
from lm.config.sampling import ORDERS, Sampling, problem_of_fill, problem_of_infill, recommended

if TYPE_CHECKING:
    from lm.config.settings import Config
    from lm.inference.batch_generation import Prompt
    from lm.inference.generator import Generator
    from lm.inference.language_model import LanguageModel

STDIN = STDOUT = Path("-")


@click.command(
    cls=FriendlyCommand,
    short_help="Generate text, fill masks, or chat.",
    extra_hint="write a text to continue as --prompt TEXT, in quotes",
    sections=(
        Section("What to write", "prompts fills infills chat source output", "unmask rounds order top rows"),
        Section(
            "Sampling",
            "max_new_tokens temperature top_p repetition_penalty stop seed",
            "top_k min_p typical_p presence_penalty frequency_penalty logprobs",
        ),
        Section("Model", "which device", "compiled"),
    ),
)
@run_argument
@click.option("--prompt", "prompts", multiple=True, help='Text to continue. "" begins a new text. May be repeated.')
@click.option(
    "--fill",
    "fills",
    multiple=True,
    help="Text in which to fill each [MASK] with one token, and [MASK:5] with five; may be repeated.",
)
@click.option(
    "--infill",
    "infills",
    multiple=True,
    help="Text with one [GAP], in which to write what fits; for runs with the objective fill_in_the_middle. May be "
    "repeated.",
)
@click.option(
    "--unmask",
    default=0,
    metavar="N",
    help="Append N masks to each prompt and fill them using context from both sides.",
)
@click.option(
    "--rounds",
    default=0,
    metavar="K",
    help="Fill masks in K rounds with sampled tokens, keeping the most certain ones of each round. Default: --fill "
    "takes the most likely token and --unmask samples, both one mask at a time.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default="confidence",
    show_default=True,
    help="Masks that a round fills: those whose tokens are the most probable, or any.",
)
@click.option("--top", default=5, show_default=True, metavar="N", help="Candidates to show for each filled mask.")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help='JSONL file to continue: {"prompt": "…"} or {"messages": […]} per line; - for standard input.',
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSONL file for the continuations of --input. Default: -, standard output.",
)
@click.option("--chat", is_flag=True, help="Chat with the model; Ctrl-C stops an answer, Ctrl-D ends the chat.")
@click.option("--rows", default=16, show_default=True, help="Maximum number of texts generated at the same time.")
@sampling_options
@click.option("--logprobs", type=int, help="With --json: log-probabilities of the tokens and of the top N tokens.")
@compile_option
@device_option
@checkpoint_option
@json_option
def sample(
    run: Path,
    prompts: tuple[str, ...],
    fills: tuple[str, ...],
    infills: tuple[str, ...],
    unmask: int,
    rounds: int,
    order: str,
    top: int,
    source: Path | None,
    output: Path | None,
    chat: bool,
    rows: int,
    compiled: bool,
    device: str,
    which: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with the model of RUN: continue prompts, fill masks, chat. Only the text goes to stdout.

    \b
    kindling sample runs/mine --prompt "Once upon a time" --temperature 0.7
    kindling sample runs/mine --fill "The [MASK] sat on the mat."
    """
    source_of = click.get_current_context().get_parameter_source
    chosen = {name: value for name, value in sampling.items() if source_of(name) is not ParameterSource.DEFAULT}
    settings = Sampling(**sampling | recommended(run) | chosen)
    problems = settings.problems()
    problems += _conflicts(prompts, (*fills, *infills), unmask, source, output, chat, as_json, settings)
    problems += [problem for text in fills if (problem := problem_of_fill(text))]
    problems += [problem for text in infills if (problem := problem_of_infill(text))]
    problems += [
        f"--{name} must be at least {least}, not {value}"
        for name, value, least in (("unmask", unmask, 0), ("rounds", rounds, 0), ("top", top, 1), ("rows", rows, 1))
        if value < least
    ]
    if problems:
        raise UserError("\n".join(problems))
    from lm.config.recipes import run_config

    config = run_config(run)
    if unmasking := prompts if config.writes_by_unmasking and not unmask else ():
        _refuse_unused(run, [*chosen, *(["compile"] if compiled else [])])
        prompts = ()
    if unmask:
        fills, prompts = (*(f"{prompt}[MASK:{unmask}]" for prompt in prompts), *fills), ()
        rounds = rounds or unmask
    _check_readouts(run, config, prompts or infills or source or chat, fills)
    output = None if output == STDOUT else output
    if output is not None and output.exists():
        raise UserError(f"{output} already exists: choose another --output")
    if output is not None:
        require_new_file(output)
    if source not in (None, STDIN) and not source.is_file():
        raise UserError(f"cannot read {source}: {'it is not a file' if source.exists() else 'there is no such file'}")
    from lm import api
    from lm.inference.batch_generation import Prompt, check_prompts, read_prompts
    from lm.inference.chat_template import chat_format
    from lm.inference.fill_mask import masks_after, tokens_to_fill
    from lm.inference.infill import infill_prompt
    from lm.runs.directory import open_run

    opened = open_run(run)
    chat_of_run = chat_format(run, opened.tokenizer, opened.config)
    given = [Prompt(prompt, settings) for prompt in prompts]
    given += [infill_prompt(opened.tokenizer, opened.config, text, settings) for text in infills]
    if source == STDIN:  # cannot be read twice
        given = list(read_prompts(source, settings, chat_of_run))
    count = len(given) if source in (None, STDIN) else check_prompts(source, settings, chat_of_run)
    written = [masks_after(opened.tokenizer, opened.config, text, settings.max_new_tokens) for text in unmasking]
    for text in fills:
        tokens_to_fill(opened.tokenizer, opened.config, text)
    model = api.load_model(opened, checkpoint=which, device=device)
    if source is not None:
        generator = _generator(model, min(rows, count), compiled)
        _continue_file(model, generator, given or read_prompts(source, settings, chat_of_run), output, count)
    if prompts or infills:
        generator = _generator(model, min(rows, count), compiled)
        if as_json:
            _print_lines(model, generator, given)
        else:
            _continue_on_screen(generator, given)
    for text in written:
        _fill(model, text, settings, rounds, order, top, as_json)
    for text in fills:
        _fill(model, text, settings if rounds else None, rounds, order, top, as_json)
    if chat:
        from lm.cli.chat import converse

        converse(_generator(model, 1, compiled, reuse=True), chat_of_run, settings)


def _conflicts(
    prompts: tuple[str, ...],
    fills: tuple[str, ...],
    unmask: int,
    source: Path | None,
    output: Path | None,
    chat: bool,
    as_json: bool,
    sampling: Sampling,
) -> list[str]:
    """Return one sentence per conflict of options."""
    modes = [bool(prompts or fills), source is not None, chat]
    rules = [
        (
            any(modes),
            'nothing to do: give --prompt "Once upon a time", --fill "The [MASK] sat on the mat.", --chat, or --input',
        ),
        (
            sum(modes) <= 1,
            "--input and --chat cannot be combined with each other, or with --prompt, --fill and --infill",
        ),
        (output is None or source is not None, "--output is the file for the continuations of --input: give --input"),
        (not unmask or bool(prompts), "--unmask continues prompts: give --prompt"),
        (not (chat and as_json), "--chat cannot print JSON"),
        (sampling.logprobs is None or as_json or source is not None, "--logprobs needs --json or --input"),
    ]
    return [sentence for holds, sentence in rules if not holds]


def _refuse_unused(run: Path, chosen: Iterable[str]) -> None:
    """Raise UserError for chosen settings that have no effect on a text that is written by filling masks."""
    used = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
    if unused := [f"--{name.replace('_', '-')}" for name in chosen if name not in used]:
        raise UserError(
            f"{run} writes by filling masks in rounds, which has no {' and no '.join(unused)}: leave "
            f"{'them' if unused[1:] else 'it'} out"
        )


def _check_readouts(run: Path, config: Config, to_continue: object, to_fill: object) -> None:
    from lm.config.recipes import require_language_model

    require_language_model(run, config)
    objective = config.objective.objective
    if to_continue and config.writes_by_unmasking:
        raise UserError(
            f"{run} was trained with {objective} and writes by filling masks (--prompt, --fill, --unmask); --input, "
            "--infill and --chat need next_token, as in a mixture such as next_token:0.5,diffusion:0.5"
        )
    if to_continue and "next_token" not in config.readouts:
        raise UserError(
            f"{run} was trained with {objective} only: it can fill masks (--fill, --unmask), but not continue a prompt"
        )
    if to_fill and config.readouts == ("next_token",):
        raise UserError(
            f"{run} was trained with {objective} only: it can continue a prompt (--prompt), but not fill masks"
        )


def _generator(model: LanguageModel, rows: int, compiled: bool, *, reuse: bool = False) -> Generator:
    from lm.inference.generator import Generator

    generator = Generator(model, max_rows=max(1, rows), reuse=reuse, compiled=compiled)
    if generator.compiling:
        click.echo(generator.compiling, err=True)
    return generator


def _continue_on_screen(generator: Generator, prompts: list[Prompt]) -> None:
    """Print the texts one after another, each as it grows; later ones are generated at the same time."""
    from lm.inference.batch_generation import events_in_order

    current = None
    for prompt, event in events_in_order(generator, prompts):
        if prompt is not current:
            sys.stdout.write(prompt.text if current is None else "\n" + prompt.text)
            current = prompt
        sys.stdout.write(event.text + ("" if event.finish_reason is None else prompt.suffix + "\n"))
        sys.stdout.flush()


def _continue_file(
    model: LanguageModel, generator: Generator, prompts: Iterable[Prompt], output: Path | None, count: int
) -> None:
    """Write one line per prompt, in order; ``output`` appears once it is complete."""
    start = time.perf_counter()
    part = None if output is None else output.with_name(output.name + ".part")
    with nullcontext() if part is None else part.open("w", encoding="utf-8", newline="\n") as file:
        tokens = _print_lines(model, generator, prompts, file)
    if part is not None and output is not None:
        rename(part, output)
    seconds = time.perf_counter() - start
    click.echo(
        f"{counted(count, 'text')}, {counted(tokens, 'token')} in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)",
        err=True,
    )


def _print_lines(
    model: LanguageModel, generator: Generator, prompts: Iterable[Prompt], file: IO[str] | None = None
) -> int:
    """Print one JSON object per continuation and return the number of tokens generated."""
    from lm.inference.batch_generation import continuations

    tokens = 0
    for each in continuations(generator, prompts):
        click.echo(json.dumps(each.as_dict(model.tokenizer), ensure_ascii=False), file=file)
        tokens += len(each.events)
    return tokens


def _fill(
    model: LanguageModel, text: str, sampling: Sampling | None, rounds: int, order: str, top: int, as_json: bool
) -> None:
    """Fill one text and print it; ``sampling`` None takes the most likely tokens."""
    from lm.inference.fill_mask import GREEDY, fill_masks

    filled = fill_masks(model, text, top=top, rounds=rounds, order=order, sampling=sampling or GREEDY)
    if as_json:
        shown = [[{"token": t, "probability": round(p, 6)} for t, p in mask] for mask in filled.candidates]
        click.echo(json.dumps({"fill": text, "filled": filled.text, "candidates": shown}, ensure_ascii=False))
        return
    click.echo(filled.text)
    for candidates in () if sampling else filled.candidates:
        click.echo("    " + "  ".join(f"{token!r} {probability:.0%}" for token, probability in candidates), err=True)
