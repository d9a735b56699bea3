"""``kindling sample``: write with a trained model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, compile_option, device_option, json_option, run_argument, sampling_options

if TYPE_CHECKING:
    from lm.inference.batch_generation import Prompt, Written
    from lm.inference.generator import Generator
    from lm.inference.sampling import Sampling
    from lm.model.transformer import Transformer
    from lm.runs.directory import Run


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--prompt", "prompts", multiple=True, help='Text to continue; may be repeated. "" begins a new text.')
@click.option(
    "--fill",
    "fills",
    multiple=True,
    help="Text in which each [MASK] is filled with one token, and [MASK:5] with five; may be repeated.",
)
@click.option(
    "--unmask",
    default=0,
    metavar="N",
    help="Continue each prompt by N masks, which are filled reading both ways, instead of token by token.",
)
@click.option(
    "--rounds",
    default=0,
    metavar="K",
    help="Draw the tokens of masks (--temperature and so on), in K rounds, the surest of each staying; without it "
    "--fill takes the likeliest, one mask at a time, and --unmask draws one at a time.",
)
@click.option("--top", default=5, show_default=True, metavar="N", help="Candidates to tell of each filled mask.")
@click.option(
    "--input", "source", type=click.Path(path_type=Path), help='JSONL file to continue: {"prompt": "…"} a line.'
)
@click.option("--output", type=click.Path(path_type=Path), help="JSONL file for the continuations of --input.")
@click.option("--chat", is_flag=True, help="Talk with the model; Ctrl-C ends an answer, Ctrl-D the talk.")
@click.option("--rows", default=16, show_default=True, help="Texts that are written at the same time, at most.")
@sampling_options
@click.option("--logprobs", type=int, help="With --json: log-probabilities of the tokens and of N likeliest ones.")
@compile_option
@device_option
@checkpoint_option
@json_option
def sample(
    run: Path,
    prompts: tuple[str, ...],
    fills: tuple[str, ...],
    unmask: int,
    rounds: int,
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
    """Write with the model of RUN: continue prompts, fill masks, talk. The text alone goes to stdout."""
    from lm.inference.sampling import Sampling
    from lm.model.device import choose_device
    from lm.runs.directory import open_run

    settings = Sampling(**sampling)
    problems = settings.problems()
    problems += _impossible(prompts, fills, unmask, source, output, chat, as_json, settings)
    problems += [
        f"--{name} must be at least {least}, not {value}"
        for name, value, least in (("unmask", unmask, 0), ("rounds", rounds, 0), ("top", top, 1), ("rows", rows, 1))
        if value < least
    ]
    if problems:
        raise UserError("\n".join(problems))
    opened = open_run(run)
    if unmask:
        fills, prompts = (*(f"{prompt}[MASK:{unmask}]" for prompt in prompts), *fills), ()
        rounds = rounds or unmask
    _check_readouts(opened, prompts or source or chat, fills)
    count = _check_files(source, output, settings)
    model = opened.load_model(choose_device(device), opened.checkpoint(which))
    writer = _Writer(opened, model, settings, rows, compiled)
    if source is not None:
        writer.continue_file(source, output, count)
    if prompts:
        (writer.continue_as_json if as_json else writer.continue_on_screen)(prompts)
    for text in fills:
        _fill(opened, model, text, settings if rounds else None, rounds, top, as_json)
    if chat:
        from lm.cli.chat import converse

        converse(opened, model, settings, compiled=compiled)


def _impossible(
    prompts: tuple[str, ...],
    fills: tuple[str, ...],
    unmask: int,
    source: Path | None,
    output: Path | None,
    chat: bool,
    as_json: bool,
    sampling: Sampling,
) -> list[str]:
    """Options that do not go together, a sentence each."""
    wishes = [bool(prompts or fills), source is not None, chat]
    rules = [
        (
            any(wishes),
            'nothing to do: give --prompt "Once upon a time", --fill "The [MASK] sat on the mat.", --chat, or --input',
        ),
        (sum(wishes) <= 1, "--input and --chat each stand alone, without the other, --prompt and --fill"),
        (output is None or source is not None, "--output is where the continuations of --input go: give that, too"),
        (not unmask or bool(prompts), "--unmask continues prompts: give --prompt, too"),
        (not (chat and as_json), "--chat prints no JSON"),
        (sampling.logprobs is None or as_json or source is not None, "--logprobs needs --json or --input"),
    ]
    return [sentence for holds, sentence in rules if not holds]


def _check_readouts(run: Run, to_continue: object, to_fill: object) -> None:
    from lm.config.settings import OBJECTIVES

    objective = run.config.objective.objective
    if to_continue and "next_token" not in OBJECTIVES[objective][1]:
        raise UserError(
            f"{run.path} was trained with {objective} only: it can fill masks (--fill, --unmask), "
            "but not continue a prompt"
        )
    if to_fill and OBJECTIVES[objective][1][-1] == "next_token":
        raise UserError(
            f"{run.path} was trained with {objective} only: it can continue a prompt (--prompt), but not fill masks"
        )


def _check_files(source: Path | None, output: Path | None, sampling: Sampling) -> int:
    """The number of prompts in ``source``, all of them good."""
    from lm.inference.batch_generation import check_prompts

    if output is not None and output.exists():
        raise UserError(f"{output} is there already: choose another --output")
    return 0 if source is None else check_prompts(source, sampling)


@dataclass(frozen=True)
class _Writer:
    """Continues texts with one model, and prints them."""

    run: Run
    model: Transformer
    sampling: Sampling
    rows: int
    compiled: bool

    def continue_on_screen(self, prompts: tuple[str, ...]) -> None:
        """The texts one after another, each as it grows; those after the first are written at the same time."""
        from lm.inference.batch_generation import in_order

        current = None
        for prompt, event in in_order(self._generator(len(prompts)), self._prompts(prompts), self.rows):
            if prompt is not current:
                sys.stdout.write(prompt.text if current is None else "\n" + prompt.text)
                current = prompt
            sys.stdout.write(event.text + ("" if event.finish_reason is None else "\n"))
            sys.stdout.flush()

    def continue_as_json(self, prompts: tuple[str, ...]) -> None:
        from lm.inference.batch_generation import whole_texts

        for written in whole_texts(self._generator(len(prompts)), self._prompts(prompts), self.rows):
            click.echo(self._json(written))

    def continue_file(self, source: Path, output: Path | None, count: int) -> None:
        """A line for each of the ``count`` prompts, in their order; ``output`` is there when it is complete."""
        from lm.inference.batch_generation import read_prompts, whole_texts

        start, tokens = time.perf_counter(), 0
        part = None if output is None else output.with_name(output.name + ".part")
        with click.open_file("-" if part is None else str(part), "w", encoding="utf-8") as file:
            for written in whole_texts(self._generator(count), read_prompts(source, self.sampling), self.rows):
                file.write(self._json(written) + "\n")
                tokens += len(written.events)
        if part is not None and output is not None:
            part.replace(output)
        seconds = time.perf_counter() - start
        told = f"{count:,} texts, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
        click.echo(told, err=True)

    def _generator(self, count: int) -> Generator:
        from lm.inference.generator import Generator

        rows = max(1, min(self.rows, count))
        context = self.run.config.data.context_length
        generator = Generator(self.model, self.run.tokenizer, context, max_rows=rows, compiled=self.compiled)
        if generator.compiling:
            click.echo(generator.compiling, err=True)
        return generator

    def _prompts(self, prompts: tuple[str, ...]) -> list[Prompt]:
        from lm.inference.batch_generation import Prompt

        return [Prompt(prompt, self.sampling) for prompt in prompts]

    def _json(self, written: Written) -> str:
        content: dict[str, Any] = {
            "prompt": written.prompt.text,
            "continuation": written.text,
            "finish_reason": written.finish_reason,
        }
        if written.prompt.sampling.logprobs is not None:
            content["tokens"] = [
                self._token(event.token, event.logprob)
                | {"top": [self._token(token, logprob) for token, logprob in event.top_logprobs]}
                for event in written.events
                if event.token is not None
            ]
        return json.dumps(content, ensure_ascii=False)

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.run.tokenizer.decode([token]), "id": token, "logprob": logprob}


def _fill(
    run: Run, model: Transformer, text: str, sampling: Sampling | None, rounds: int, top: int, as_json: bool
) -> None:
    """Fill one text and print it; ``sampling`` None: with the likeliest tokens."""
    from lm.inference.fill_mask import GREEDY, fill_masks

    readout = run.config.readouts[-1]
    context_length = run.config.data.context_length
    filled = fill_masks(
        model, run.tokenizer, text, readout, context_length, top=top, rounds=rounds, sampling=sampling or GREEDY
    )
    if as_json:
        told = [[{"token": t, "probability": round(p, 6)} for t, p in mask] for mask in filled.candidates]
        click.echo(json.dumps({"fill": text, "filled": filled.text, "candidates": told}, ensure_ascii=False))
        return
    click.echo(filled.text)
    for candidates in () if sampling else filled.candidates:
        click.echo(
            "    " + "  ".join(f"{token.strip()} {probability:.0%}" for token, probability in candidates), err=True
        )
