"""Kindling from Python: load a model and use it; train, fine-tune, evaluate. The commands call these functions too."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.settings import ReadSettings
from lm.config import recipes
from lm.config.sampling import Sampling, recommended
from lm.config.settings import Config
from lm.data.examples import Columns, Example, read_examples, read_similar, unlabeled_texts
from lm.evaluation import baselines, image_features, minimal_pairs, multiple_choice, perplexity, validation_loss
from lm.evaluation.bootstrap import as_dicts
from lm.export.gguf import export_gguf
from lm.export.huggingface import choose_readout, export_huggingface
from lm.export.image_model import export_image_model
from lm.export.import_huggingface import import_checkpoint
from lm.export.model_card import NO_FACTS, CardFacts
from lm.export.peft_adapter import export_adapter
from lm.export.sentence_transformers import export_sentence_transformers
from lm.export.task_model import export_task_model
from lm.finetuning import finetune as finetuning
from lm.finetuning.contrastive_task import similarity as correlations
from lm.finetuning.predict import Predictor, open_predictor, predict, predict_images
from lm.inference.batch_generation import Prompt, continuations
from lm.inference.embedding import all_vectors, reading_of, whitened
from lm.inference.fill_mask import GREEDY, Filled, fill_masks
from lm.inference.generator import Generator
from lm.inference.generator import stream as stream_events
from lm.inference.image_model import ImageEncoder, pixels_of_all
from lm.inference.infill import infill_prompt
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods
from lm.model.device import choose_device
from lm.model.image_transformer import ImageTransformer
from lm.reports.image_report import write_image_report
from lm.reports.run_report import write_report
from lm.runs.checkpoint import Checkpoint
from lm.runs.directory import Run, open_run, saved_evaluation
from lm.runs.run_data import located
from lm.training import pretraining
from lm.training.distributed import is_main_process
from lm.training.reporter import Reporter
from lm.training.terminal import TerminalProgress

__all__ = ["Config", "Run", "Sampling", "UserError", "evaluate", "finetune", "load", "train"]

ROWS = 16  # texts that are generated at the same time
TEXT_METHODS: tuple[str, ...] = ("generate", "fill", "infill", "score", "perplexity", "tokenizer")
TEXT_METHODS += ("save_gguf", "save_sentence_transformer", "save_adapter")


@dataclass(frozen=True)
class Model(LanguageModel):
    """A trained language model: what ``load`` returns for a run that is not fine-tuned for a task with a head.

    Every method that takes a text also takes a list of texts, and then returns a list or an array with one item per
    text. ``run`` and ``saved`` are the run and the checkpoint that the model comes from.
    """

    run: Run
    saved: Checkpoint
    keep: object = None  # the temporary folder of an imported model

    def generate(self, prompts: str | Sequence[str], *, stream: bool = False, **sampling: Any) -> Any:
        """Continue each prompt; the continuation is returned without the prompt.

        Args:
            stream: return an iterator over the pieces of one continuation as they are generated.
            sampling: fields of ``Sampling``, such as ``max_new_tokens``, ``temperature`` or ``seed``; the defaults of
                an imported model are those of its ``generation_config.json``.

        Raises:
            UserError: a setting is wrong, or the model was trained to fill masks only.
        """
        if "next_token" not in self.readouts:
            recipes.require_language_model(self.run.path, self.config)
            raise UserError(f"{self.run.path} was trained to fill masks only: it cannot continue a prompt")
        settings = _sampling(recommended(self.run.path) | sampling)
        if stream:
            if not isinstance(prompts, str):
                raise UserError("stream=True takes one prompt, not a list")
            return (event.text for event in stream_events(self, prompts, settings))
        texts = [prompts] if isinstance(prompts, str) else prompts
        found = self._continued([Prompt(text, settings) for text in texts])
        return found[0] if isinstance(prompts, str) else found

    def infill(self, texts: str | Sequence[str], **sampling: Any) -> Any:
        """What to write in the ``[GAP]`` of each text; sampling as of ``generate``, errors as of ``infill_prompt``."""
        settings, given = _sampling(recommended(self.run.path) | sampling), [texts] if isinstance(texts, str) else texts
        found = self._continued([infill_prompt(self.tokenizer, self.config, text, settings) for text in given])
        return found[0] if isinstance(texts, str) else found

    def _continued(self, prompts: Sequence[Prompt]) -> list[str]:
        generator = Generator(self, max_rows=max(1, min(ROWS, len(prompts))))
        return [each.text for each in continuations(generator, prompts)]

    def fill(self, texts: str | Sequence[str], *, top: int = 5, rounds: int = 0, **sampling: Any) -> Any:
        """Fill every ``[MASK]`` of a text: its ``text``, and the ``top`` candidates of each mask with probabilities.

        Arguments and errors as of ``lm.inference.fill_mask.fill_masks``; without ``sampling`` the most probable tokens
        are taken.
        """
        settings = _sampling(sampling) if sampling else GREEDY

        def filled(text: str) -> Filled:
            return fill_masks(self, text, top=top, rounds=rounds, sampling=settings)

        return filled(texts) if isinstance(texts, str) else [filled(text) for text in texts]

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        reads: str | None = None,
        pooling: str | None = None,
        layer: int = -1,
        normalize: bool = False,
        whiten: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Vectors of texts, float32 (texts, hidden), or (hidden,) for one text.

        Args:
            reads: "causal" or "bidirectional"; None: bidirectional if the model was trained to fill masks.
            pooling: "mean" over the tokens, or "last"; None: mean with bidirectional attention, else last.
            layer: 0 is the embeddings, 1 the first block, -1 the last.
            normalize: scale vectors to length 1.
            whiten: texts whose vectors say how to make the numbers uncorrelated (``lm.inference.whitening``).
        """
        reading = reading_of(self.config, reads, pooling, layer, normalize=normalize)
        if whiten is not None:
            reading = whitened(reading, self, ((text,) for text in whiten))
        given = [texts] if isinstance(texts, str) else texts
        vectors, _ = all_vectors(self, ((text,) for text in given), reading)
        return vectors[0] if isinstance(texts, str) else vectors

    def score(self, texts: str | Sequence[str], *, readout: str | None = None) -> Any:
        """Log-likelihood of each text in nats, float64 (texts,), or a float for one text.

        Args:
            readout: None: the first of ``readouts``. A masked readout gives the pseudo-log-likelihood.

        Raises:
            UserError: the model was not trained for the readout, or a text is longer than its context.
        """
        given = [texts] if isinstance(texts, str) else texts
        tokens = [self.tokenizer.encode(text) for text in given]
        found = log_likelihoods(self, tokens, self._readout(readout))
        return float(found[0]) if isinstance(texts, str) else found

    def perplexity(self, source: str | Path, *, readout: str | None = None, stride: int = 0) -> float:
        """Perplexity per token of a file, a folder, or anything else that data preparation reads.

        ``evaluate(run, text=source)`` gives all readouts, bits per byte and baselines as well.

        Args:
            readout: as of ``score``.
            stride: tokens that are scored per window; 0: all.
        """
        found = perplexity.evaluate_text(self, str(source), ReadSettings(), stride=stride)
        return math.exp(found["validation"][self._readout(readout)]["nats_per_token"])

    def save_pretrained(self, folder: str | Path, *, readout: str | None = None, facts: CardFacts = NO_FACTS) -> None:
        """Write a folder that ``transformers`` loads with its own classes; errors as of ``export_huggingface``.

        Args:
            readout: None: the first that ``transformers`` reads as it was trained.
            facts: license, languages and base model for the model card.
        """
        export_huggingface(self.run, Path(folder), self.saved, choose_readout(self.run, readout), facts, self.model)

    def save_gguf(
        self, file: str | Path, *, readout: str | None = None, outtype: str = "f32", facts: CardFacts = NO_FACTS
    ) -> None:
        """Write a GGUF file for llama.cpp; arguments and errors as of ``lm.export.gguf.export_gguf``."""
        export_gguf(self.run, Path(file), self.saved, choose_readout(self.run, readout), outtype, facts, self.model)

    def save_sentence_transformer(
        self,
        folder: str | Path,
        *,
        reads: str | None = None,
        pooling: str | None = None,
        normalize: bool = False,
        facts: CardFacts = NO_FACTS,
    ) -> None:
        """Write a folder for sentence-transformers, whose vectors are those of ``embed`` with the same arguments."""
        reading = reading_of(self.config, reads, pooling, normalize=normalize)
        export_sentence_transformers(self.run, Path(folder), self.saved, self.model, reading, facts)

    def save_adapter(self, folder: str | Path, *, facts: CardFacts = NO_FACTS) -> None:
        """Write a run's LoRA for PEFT, with its base; errors as of ``lm.export.peft_adapter.export_adapter``."""
        export_adapter(self.run, Path(folder), self.saved, facts=facts)

    def _readout(self, wanted: str | None) -> str:
        recipes.require_language_model(self.run.path, self.config)
        if wanted is not None and wanted not in self.readouts:
            raise UserError(f"{self.run.path} was trained for {' and '.join(self.readouts)}, not for {wanted}")
        return wanted or self.readouts[0]


@dataclass(frozen=True)
class TaskModel(Predictor):
    """A model that was fine-tuned for a task with a head: what ``load`` returns for such a run."""

    def predict(self, inputs: Sequence[str | Sequence[str]]) -> list[dict[str, Any]]:
        """The answer to each input, as ``kindling predict`` writes it: a label with probabilities, a value, …

        Args:
            inputs: texts; (text, text) for a task on pairs, the words of a sentence for tagging words, (question,
                answer, answer, …) for choosing an answer.
        """
        if isinstance(inputs, str):
            raise UserError('predict takes a list of texts: predict(["..."])')
        texts = [(each,) if isinstance(each, str) else tuple(each) for each in inputs]
        examples = [Example(each, None, f"input {number}") for number, each in enumerate(texts)]
        return [answer for answer, _ in predict(self, examples)]

    def save_pretrained(self, folder: str | Path, *, facts: CardFacts = NO_FACTS) -> None:
        """As of ``Model.save_pretrained``; raise UserError if no class computes what this model does."""
        state = self.model.trunk.state_dict()
        export_task_model(self.run, Path(folder), self.saved, state, self.exportable_head, facts)

    def save_adapter(self, folder: str | Path, *, facts: CardFacts = NO_FACTS) -> None:
        """Write a run's LoRA and head for PEFT; errors as of ``lm.export.peft_adapter.export_adapter``."""
        export_adapter(self.run, Path(folder), self.saved, self.exportable_head, facts)


@dataclass(frozen=True)
class ImageModel(ImageEncoder):
    """A model that reads images: what ``load`` returns for such a run, unless it was fine-tuned for a task.

    ``embed`` makes vectors of images. ``run`` and ``saved`` are the run and the checkpoint that the model comes from.
    """

    run: Run
    saved: Checkpoint

    def save_pretrained(self, folder: str | Path, *, facts: CardFacts = NO_FACTS) -> None:
        """As of ``Model.save_pretrained``; errors as of ``export_image_model``."""
        export_image_model(self.run, Path(folder), self.saved, facts, self.model)

    def __getattr__(self, name: str) -> Any:
        """UserError for what only models of text can do; called for names that do not exist."""
        if name in TEXT_METHODS:
            raise UserError(f"{self.run.path} reads images, so there is no {name}: use embed")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


@dataclass(frozen=True)
class ImageTaskModel(Predictor):
    """A model that was fine-tuned for a task on images: what ``load`` returns for such a run."""

    def predict(self, images: Any) -> list[dict[str, Any]]:
        """The answer to each image, its label with probabilities; arguments and errors as of ``ImageModel.embed``."""
        return list(predict_images(self, pixels_of_all(images, self.run.image_format)))

    def save_pretrained(self, folder: str | Path, *, facts: CardFacts = NO_FACTS) -> None:
        """Write the trunk as of ``ImageModel.save_pretrained``, and the head as a file of its own."""
        trunk = self.model.trunk
        assert isinstance(trunk, ImageTransformer)
        export_image_model(self.run, Path(folder), self.saved, facts, trunk, self.exportable_head)


def load(run: str | Path | Run, *, checkpoint: str | int | None = None, device: str = "auto") -> Any:
    """Load the model of a run, or a folder of ``transformers`` (Llama, Mistral, Qwen3, EuroBERT).

    Args:
        checkpoint: "newest", "best", "average", or a step; None: newest, or best for a run with a task's head.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        A ``Model``, or a ``TaskModel`` for a run that was fine-tuned for a task with a head; an ``ImageModel`` or an
        ``ImageTaskModel`` for one that reads images.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    if (path / "config.json").is_file() and not (path / "config.toml").is_file():
        folder = tempfile.TemporaryDirectory()
        import_checkpoint(str(path), Path(folder.name) / "run")
        return dataclasses.replace(load_model(Path(folder.name) / "run", device=device), keep=folder)
    opened = open_run(path)
    if opened.config.has_task_head:
        return load_task_model(opened, checkpoint=str(checkpoint or "best"), device=device)
    load_one = load_image_model if opened.config.reads_images else load_model
    return load_one(opened, checkpoint=str(checkpoint or "newest"), device=device)


def load_model(run: str | Path | Run, *, checkpoint: str = "newest", device: str = "auto") -> Model:
    """``load`` of a run that must be a language model."""
    opened = run if isinstance(run, Run) else open_run(run)
    saved = opened.checkpoint(checkpoint)
    return Model(opened.load_model(choose_device(device), saved), opened.tokenizer, opened.config, opened, saved)


def load_image_model(run: str | Path | Run, *, checkpoint: str = "newest", device: str = "auto") -> ImageModel:
    """``load`` of a run that must read images and have no task's head."""
    opened = run if isinstance(run, Run) else open_run(run)
    recipes.require_image_model(opened.path, opened.config)
    saved = opened.checkpoint(checkpoint)
    model = opened.load_image_model(choose_device(device), saved)
    return ImageModel(model, opened.image_format, opened.config, opened, saved)


def load_task_model(
    run: str | Path | Run, *, checkpoint: str = "best", device: str = "auto"
) -> TaskModel | ImageTaskModel:
    """``load`` of a run that must have a task's head."""
    found = open_predictor(run.path if isinstance(run, Run) else run, choose_device(device), checkpoint)
    kind = ImageTaskModel if found.config.reads_images else TaskModel
    return kind(found.run, found.model, found.answers, found.saved)


def train(
    recipe: str | Path | Config | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Pretrain a model, or resume the run that is there, and write its report.

    Args:
        recipe: a TOML file, the name of a recipe that comes with Kindling, or a ``Config``; None: as the run has it.
        run: the run directory; None: runs/NAME-OF-THE-RECIPE.
        resume: resume even if settings of the training have changed; with no recipe, with the settings the run has.
        reporter: called as training proceeds; None: a progress bar.
        settings: any setting by its name, as on the command line: ``data="data/mine", steps=200``.

    Raises:
        UserError: the data, the settings and the run directory do not fit together; one line per problem.
        SystemExit: stopped by Ctrl-C or SIGTERM, with a checkpoint written; the same call resumes.
    """
    if isinstance(recipe, Config):
        config, path = recipe, Path(run or "")
    else:
        config, path, _ = recipes.pretraining_config(recipe, run, _plain(settings))
    done = pretraining.train(config, path, reporter or TerminalProgress(), accept_changes=resume)
    if is_main_process():
        _write_report(done)
    return done


def _write_report(run: Run) -> None:
    """Write ``report.html`` unless it is newer than the newest checkpoint."""
    report, newest = run.path / "report.html", run.latest()
    if newest is None or (report.exists() and report.stat().st_mtime >= newest.path.stat().st_mtime):
        return
    evaluation = saved_evaluation(run, newest)
    if run.config.reads_images:
        write_image_report(run, evaluation)
    else:
        write_report(run, evaluation, run.config.report.prompts, run.config.report.fills)


def finetune(
    base: str | Path | Run | Config,
    *,
    run: str | Path,
    resume: bool = False,
    recipe: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> finetuning.Finetuned:
    """Fine-tune a run on a task, or resume the fine-tuning that is there.

    Args:
        base: the pretrained run, or complete settings.
        run: the run directory to write.
        recipe: a TOML file with settings.
        settings: any setting by its name: ``task="classification", train="train.jsonl", validation="dev.jsonl"``.

    Returns:
        The new run, with the ``scores`` of its best validation and the ``step`` of it.

    Raises:
        UserError, SystemExit: as of ``train``.
    """
    if isinstance(base, Config):
        config = base
    else:
        start, file = base if isinstance(base, Run) else open_run(base), Path(recipe) if recipe else None
        config = recipes.finetuning_config(start.path, start.config, _plain(settings), file)
    return finetuning.finetune(config, Path(run), reporter or TerminalProgress(), accept_changes=resume)


def evaluate(
    run: str | Path | Run,
    *,
    data: str | Path = "",
    text: str | Path = "",
    text_field: str = "text",
    stride: int = 0,
    pairs: str | Path = "",
    sentences: tuple[str, str] = minimal_pairs.COLUMNS,
    ties: str = "half",
    choices: str | Path = "",
    similarity: str | Path = "",
    train: str | Path = "",
    test: str | Path = "",
    columns: Columns | None = None,
    reads: str | None = None,
    pooling: str | None = None,
    layer: int = -1,
    whiten: str | Path = "",
    checkpoint: str | int = "newest",
    device: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a run: the loss on its validation split, or one of the other measures if it is named.

    Of a run that reads images: its features (``lm.evaluation.image_features.evaluate_images``).

    Args:
        data: another dataset whose validation split to use.
        text: the loss on any text instead (``text_field``: the field of records; ``stride``: tokens scored per window).
        pairs: minimal pairs (``sentences``: the columns of the acceptable and the other one; ``ties``: half or first).
        choices: multiple-choice questions, with ``columns``.
        similarity: pairs of texts with how similar they are, with ``columns``; ``reads``, ``pooling`` and ``layer`` are
            as of ``Model.embed``, and ``whiten`` is a file of its texts.
        train, test: labeled images to judge the features of an image run on, instead of its data's splits.
        progress: called with a line before each part.

    Returns:
        What ``evaluate.py --json`` prints.

    Raises:
        UserError: two measures are named, or a file is missing or wrong.
    """
    measures = {"data": data, "text": text, "pairs": pairs, "choices": choices, "similarity": similarity}
    if len(named := [name for name, value in measures.items() if value]) > 1:
        raise UserError(f"{' and '.join(named)} cannot be combined: choose one of them")
    opened = run if isinstance(run, Run) else open_run(run)
    if opened.config.reads_images:
        if named and named != ["data"]:
            raise UserError(f"{opened.path} reads images, and {named[0]} is for a run that reads text: leave it out")
        return image_features.evaluate_images(
            opened, data=str(data), train=str(train), test=str(test), layer=layer,
            checkpoint=opened.checkpoint(str(checkpoint)), device=device, progress=progress,
        )  # fmt: skip
    if train or test:
        raise UserError(f"{opened.path} reads text, and train and test are for a run that reads images: leave them out")
    (recipes.require_text_model if similarity else recipes.require_language_model)(opened.path, opened.config)
    reading = reading_of(opened.config, reads, pooling, layer)
    paradigms = minimal_pairs.read_pairs(Path(pairs), sentences) if pairs else []
    saved = opened.checkpoint(str(checkpoint))
    if not (text or pairs or choices or similarity):
        return validation_loss.evaluate(opened, str(data), saved)

    def model() -> Model:  # after the files of examples have been read, so that their mistakes show at once
        return load_model(located(opened), checkpoint=str(checkpoint), device=device)

    if text:
        rules = ReadSettings(text_field=text_field)
        found = perplexity.evaluate_text(model(), str(text), rules, stride=stride, progress=progress)
        return {"step": saved.step, **found}
    if pairs:
        found = minimal_pairs.evaluate_model(model(), paradigms, ties=ties, progress=progress)
        return {"ties": ties, "accuracy": as_dicts(found)}
    if choices:
        examples = read_examples(str(choices), "choice", columns or Columns())
        accuracy, cut = multiple_choice.evaluate_choices(model(), examples, progress=progress)
        return {"questions": len(examples), "cut": cut, "accuracy": as_dicts(accuracy)}
    rated = read_similar(str(similarity), columns or Columns())
    read = model()
    if whiten:
        rows = unlabeled_texts(str(whiten), columns or Columns())
        reading = whitened(reading, read, ((text,) for texts in rows for text in texts))
    found = correlations(read, rated, reading)
    return {"pairs": len(rated), **found, "baselines": {"tfidf": baselines.tfidf_similarity(rated)}}


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Raises a UserError that lists everything that is wrong with the settings."""
    known = [field.name for field in dataclasses.fields(Sampling)]
    problems = [f'unknown setting "{name}"{recipes.suggestion(name, known)}' for name in settings if name not in known]
    sampling = Sampling(**{name: value for name, value in settings.items() if name in known})
    if problems := problems + sampling.problems():
        raise UserError("\n".join(problems))
    return sampling


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the recipes take them: a path becomes a text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
