# SPDX-License-Identifier: Apache-2.0
"""The main job, whole: from a recipe to an output directory with a trained model, its scores and a report."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from minbert_fast.common.device import choose_device, choose_precision, peak_memory
from minbert_fast.common.errors import RunError, writing
from minbert_fast.common.provenance import current_commit, describe_environment, tensors_digest
from minbert_fast.common.schema import ConfigError, plain
from minbert_fast.data.files import read_table
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.parallel.world import World, joined
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import flat
from minbert_fast.step.captured import Captures
from minbert_fast.step.stepping import Backend
from minbert_fast.tasks import MultitaskModel, evaluation
from minbert_fast.trainer import loop
from minbert_fast.trainer.checkpoint import Checkpoint, CheckpointStore, differences
from minbert_fast.trainer.datasets import load_datasets
from minbert_fast.trainer.outputs import SUMMARY, RunDirectory, fresh_directory
from minbert_fast.trainer.progress import progress_for
from minbert_fast.trainer.signals import StopSignals
from minbert_fast.trainer.stages import Means, make_stage
from minbert_fast.trainer.trackers import check, tracking

DEMONSTRATION = (
    "This is a demonstration: a tiny model, from random weights, learns the small made-up sample data that ship with "
    "the package. For something useful: --data DIR --model DIR"
)

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
SHOWN_CHANGES = 5  # differences named when a run cannot be resumed

# Values of a recipe that a resumed run may change: where things lie (their content is compared), how far it goes,
# and what it writes down.
FREE = {
    "name": None,
    "description": None,
    "source": None,
    "published": None,
    "checkpoint": None,
    "logging": None,
    "data": ("directory", "files", "cache", "max_bad_rows"),
    "model": ("name",),
    "training": ("max_steps", "shard"),
}


@dataclass(frozen=True)
class Options:
    """What a run needs to know beside its recipe. `output` None: a new directory under runs/."""

    output: Path | None = None
    device: str = "auto"
    backend: Literal["auto", "fast", "reference"] = "auto"
    resume: bool = False
    overwrite: bool = False
    copies: Mapping[tuple[str, str], Path] = field(default_factory=dict)  # (dataset, split): predictions go here too
    report_to: tuple[str, ...] = ()  # names of trackers.KNOWN
    command: str = ""


def train(recipe: Recipe, options: Options) -> Path:
    """Runs `recipe` and returns the output directory.

    Raises ConfigError or DataError for a mistake of the user, RunError or InterruptError for a run that had to stop.
    """
    path = options.output or fresh_directory(Path("runs") / recipe.name)
    try:
        with joined(choose_device(options.device)) as (world, device), _directory(path, world) as files:
            _Job(recipe, replace(options, output=path), files, world, device).run()
    except (RuntimeError, MemoryError) as error:
        if not loop.out_of_memory(error):
            raise
        raise RunError(
            "out of memory outside training steps: choose a smaller model or --set data.max_length"
        ) from error
    return path


@contextmanager
def _directory(path: Path, world: World) -> Iterator[RunDirectory]:
    """The output directory for rank 0; for the others a place of their own, which nobody will look at."""
    with ExitStack() as stack:
        if not world.is_main:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="minbert_fast-rank-"))) / "run"
        yield stack.enter_context(RunDirectory(path))


class _Job:
    def __init__(
        self, recipe: Recipe, options: Options, files: RunDirectory, world: World, device: torch.device
    ) -> None:
        check(options.report_to)
        self.options = options
        self.files = files
        self.notices: list[str] = []
        self.commit = current_commit()  # now: the checkout may move on while a long run goes on
        self.world = world
        self.device = device
        self.precision = choose_precision(recipe.training.precision, self.device)
        self.backend: Backend = "fast" if options.backend == "auto" else options.backend
        self.demonstration = not (recipe.model.name or recipe.data.directory or recipe.data.files)
        if world.size > 1 and self.backend == "reference":
            raise ConfigError(f"--backend reference trains in one process, not in {world.size}")
        self._open_directory()
        if self.demonstration and world.is_main:
            print(DEMONSTRATION, flush=True)
        with StopSignals() as signals, signals.interruptible():
            self._load(recipe)

    def say(self, line: str) -> None:
        """A line for the user that the summary keeps as well."""
        self.notices.append(line)
        if self.world.is_main:
            print(line, flush=True)

    # ---- Before the first step ------------------------------------------------------------------------------------

    def _open_directory(self) -> None:
        files, options = self.files, self.options
        if files.used and options.overwrite:
            files.clear()
        elif files.used and not options.resume:
            raise RunError(f"{files.path} holds a run already: --resume goes on with it, --overwrite starts anew")

    def _load(self, recipe: Recipe) -> None:
        self._say_what_is_embedded(recipe)
        source = weights.resolve(recipe.model.name) if recipe.model.name else sample_directory().model
        self.tokenizer = Tokenizer.from_pretrained(_vocabulary_of(source))
        if not self.world.is_main:  # rank 0 reads first, and leaves the others its cache
            self.world.wait()
        self.data = load_datasets(recipe, self.tokenizer, self.say)
        if self.world.is_main:
            self.world.wait()
        self.recipe = self.data.recipe
        dropout = self.recipe.model.dropout
        overrides: dict[str, Any] = {} if dropout is None else dict.fromkeys(DROPOUTS, dropout)
        encoder = BertModel.from_pretrained(source, **overrides)
        self._check_sizes(encoder)
        self.encoder_hash = tensors_digest(encoder.state_dict())
        torch.manual_seed(self.recipe.training.seed)  # heads start from it
        self.model = MultitaskModel(encoder, self.data.tasks, self.recipe.model.pooling).to(self.device)
        if not all(task.predicts for task in self.data.tasks.values()):  # further pre-training
            for name in self.model.load_pretraining_heads(weights.pretraining_heads(source), str(source)):
                self.say(f"tasks.{name} starts from the model's own pre-training head")
        self.captures = Captures()
        means = Means(
            self.model,
            self.tokenizer,
            self.data.train,
            self.device,
            self.precision,
            self.backend,
            self.world,
            self.captures,
        )
        self.stages = [make_stage(means, self.recipe, index) for index in range(len(self.recipe.resolved_stages()))]
        self._check_select()

    def _say_what_is_embedded(self, recipe: Recipe) -> None:
        """Half a demonstration is rarely meant."""
        if self.demonstration:
            return
        if not recipe.model.name:
            self.say(
                "no --model: the embedded tiny model, from random weights, is trained; it has little to learn with"
            )
        if not (recipe.data.directory or recipe.data.files):
            self.say("no --data: the embedded sample, made-up sentences, is trained on")

    def _check_sizes(self, encoder: BertModel) -> None:
        config = encoder.config
        if self.tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer knows {self.tokenizer.vocab_size:,} word pieces, the model {config.vocab_size:,}"
            )
        if self.recipe.data.max_length > config.max_position_embeddings:
            data = replace(self.recipe.data, max_length=config.max_position_embeddings)
            self.recipe = replace(self.recipe, data=data)
            self.say(f"the model has {data.max_length} positions: longer sentences are cut to them")

    def _check_select(self) -> None:
        """Before the first step rather than at the first evaluation, which may be hours away."""
        select, known = self.recipe.training.select, ["score"]
        for name, table in self.data.dev.items():
            assert table.labels is not None
            known += self.data.tasks[name].evaluate(table.labels[:2], table.labels[:2])
        if select not in known:
            raise ConfigError(
                f"training.select = {select!r}: no such dev metric in this run; known: {', '.join(known)}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with."""
        recipe = plain(self.recipe)
        for section, keys in FREE.items():
            if keys is None:
                recipe.pop(section, None)
            else:
                recipe[section] = {key: value for key, value in recipe[section].items() if key not in keys}
        return {
            "recipe": recipe,
            "data": self.data.fingerprint(),
            "model": {"weights": self.encoder_hash, "tokenizer": self.tokenizer.fingerprint},
            "backend": self.backend,
            "precision": self.precision,
        }

    def _checkpoint(self) -> Checkpoint | None:
        """What to go on from. Raises RunError where the run there was another one."""
        if not self.options.resume:
            return None
        assert self.options.output is not None
        # Every process reads what rank 0 wrote.
        checkpoints = self.options.output / self.files.checkpoints.name
        found = CheckpointStore(checkpoints, self.recipe.checkpoint.keep).newest(self.say)
        if found is None:
            self.say(f"no checkpoint in {self.files.path}: starting from the beginning")
            return None
        # Through JSON, as the other one went.
        changed = differences(found.state["fingerprint"], json.loads(json.dumps(self.fingerprint())))
        if changed:
            more = f" (and {len(changed) - SHOWN_CHANGES} more differences)" if len(changed) > SHOWN_CHANGES else ""
            shown = "; ".join(changed[:SHOWN_CHANGES])
            raise ConfigError(
                f"{self.files.path}: cannot go on with another run: {shown}{more}; --resume goes alone, or with the "
                "flags that the run was started with"
            )
        for line in differences(found.state["environment"], describe_environment(self.device)):
            self.say(f"{line}: what follows may differ in the last bits from an uninterrupted run")
        self.say(f"going on after step {found.step}")
        return found

    def _check_others(self, checkpoint: Checkpoint | None) -> None:
        """Raises ConfigError where processes, perhaps on other machines, are about to train anything else together."""
        begins = "the beginning"
        if checkpoint is not None:
            state = json.dumps(checkpoint.state, sort_keys=True).encode()
            begins = f"step {checkpoint.step}, {hashlib.blake2b(state, digest_size=4).hexdigest()}"
        first, *others = self.world.every({"starts from": begins, **self.fingerprint()})
        for rank, other in enumerate(others, start=1):
            unlike = differences(first, other, f"{{name}} {{then}} on rank 0, {{now}} on rank {rank}")
            if unlike:
                raise ConfigError(
                    f"cannot train together: {'; '.join(unlike[:SHOWN_CHANGES])}; every machine needs the same data and "
                    f"model, and to go on the same checkpoints in {self.options.output}"
                )

    # ---- The run, and what is left of it ----------------------------------------------------------------------------

    def run(self) -> None:
        """Trains, then writes last/, predictions, summary.json and the report."""
        checkpoint = self._checkpoint()
        self._check_others(checkpoint)  # and nothing is written before all have read
        self.files.prepare()
        self.files.write_recipe(self.recipe.to_toml())
        trainer = loop.Trainer(
            recipe=self.recipe,
            stages=self.stages,
            model=self.model,
            files=self.files,
            evaluate=self._evaluate,
            save=self._save,
            constants={"fingerprint": self.fingerprint(), "environment": describe_environment(self.device)},
            progress=lambda done, total: progress_for(done, total, self.world.is_main),
            eager_fetch=self.device.type == "cpu",
            world=self.world,
        )
        if self.world.is_main:
            print(self._opening_line(trainer.total), flush=True)
        first_step = 0 if checkpoint is None else checkpoint.step
        reported = self.options.report_to if self.world.is_main else ()
        with tracking(reported, self.files.path, first_step, flat(plain(self.recipe))) as follow:
            self.files.metrics.follow = follow
            outcome = trainer.run(checkpoint)
        if not self.world.is_main:
            return
        self.files.write_directory("last", self._save)
        if outcome.best is None:  # nothing to choose by
            self.files.write_directory("best", self._save)
        self._test_predictions()
        self._copy_predictions()
        self.files.write_json(SUMMARY, self._summary(outcome))
        with writing(self.files.path / "report.html"):
            write_report(self.files.path)
        print(closing_lines(outcome, self.files.path), flush=True)

    def _opening_line(self, steps: int) -> str:
        """What is about to happen, before an evaluation that may take minutes."""
        rows = ", ".join(f"{name} {len(table):,}" for name, table in self.data.train.items())
        how = f"on {self.device.type} in {self.precision}, {self.backend} backend"
        return f"recipe {self.recipe.name}: {steps:,} steps {how}; training rows: {rows}; results in {self.files.path}"

    def _save(self, directory: Path) -> None:
        self.model.save(directory, self.recipe.to_toml(), self.tokenizer)

    def _evaluate(self) -> loop.Evaluation | None:
        if not self.data.dev:
            return None
        found: list[evaluation.Evaluation] = []

        def measure() -> dict[str, float | None]:
            found.append(self._predict(self.data.dev))
            return {name: value if math.isfinite(value) else None for name, value in found[0].metrics.items()}

        def write(directory: Path) -> None:
            tables = self.data.dev.items()
            texts = {n: read_table(t.path, t.task, max_bad_rows=1.0).sentences for n, t in tables}
            found[0].write(directory, texts)

        metrics = self.world.from_main(measure)
        return loop.Evaluation(metrics, self._score(metrics), write)

    def _predict(self, tables: Mapping[str, TokenTable]) -> evaluation.Evaluation:
        return evaluation.evaluate(self.model, tables, precision=self.precision, max_length=self.recipe.data.max_length)

    def _score(self, metrics: Mapping[str, float | None]) -> float:
        value = metrics[self.recipe.training.select]
        return -math.inf if value is None else value

    def _test_predictions(self) -> None:
        """Predictions of the best model on test files, where there are any."""
        if not self.data.test:
            return
        self.model = MultitaskModel.load(self.files.path / "best").to(self.device)
        found = self._predict(self.data.test)
        with writing(self.files.path / "predictions"):
            found.write_predictions(self.files.path / "predictions", "test")

    def _copy_predictions(self) -> None:
        """The course's --sst_dev_out and its like."""
        for (dataset, split), target in self.options.copies.items():
            for name, task in self.data.tasks.items():
                written = self.files.path / "predictions" / task.prediction_file(split)
                if task.dataset == dataset and name in self.data.tasks and written.exists():
                    with writing(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(written, target)

    def _summary(self, outcome: loop.Outcome) -> dict[str, Any]:
        state = outcome.state
        return {
            "dev": {} if outcome.best is None else outcome.best["metrics"],
            "untrained": state.untrained,
            "best": None if outcome.best is None else {key: outcome.best[key] for key in ("step", "score")},
            "steps": state.step,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "skipped_steps": state.skipped_steps,
            "ended": outcome.reason,
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "demonstration": self.demonstration,
            "backend": self.backend,
            **describe_environment(self.device),
            "precision": self.precision,
            "timings": state.timings,
            "peak_memory_bytes": peak_memory(self.device),
            "graphs": asdict(self.captures),
            "notices": self.notices,
            "command": self.options.command,
            "commit": self.commit,
        }


def _vocabulary_of(source: Path) -> Path:
    """Where a model's tokenizer files are. Raises ConfigError for a course `.pt` file without any beside it."""
    if source.is_dir():
        return source
    if not any((source.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ConfigError(f"{source}: no vocab.txt beside it; expected that of the weights it was trained from")
    return source.parent


def closing_lines(outcome: loop.Outcome, path: Path) -> str:
    """What the run came to: dev scores before and after, and where things are."""
    state, best = outcome.state, outcome.best
    lines = [f"{outcome.reason}: {state.step:,} steps, {state.tokens:,} tokens, {state.seconds:.0f} s"]
    if best is not None:
        before = state.untrained or {}
        width = max(len(name) for name in best["metrics"])
        lines.append(f"{'dev':{width}}  untrained  best (step {best['step']})")
        for name, value in best["metrics"].items():
            lines.append(f"{name:{width}}  {_shown(before.get(name)):>9}  {_shown(value)}")
    lines.append(f"{path}: best/ and last/ (models), summary.json, metrics.jsonl, predictions/, report.html")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
