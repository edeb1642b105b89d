# SPDX-License-Identifier: Apache-2.0
"""A whole training run: from a recipe to an output directory with the trained model, its scores and a report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from minbert_fast.common.device import choose_device, choose_precision, peak_memory
from minbert_fast.common.errors import RunError, is_out_of_memory, translate_write_errors
from minbert_fast.common.provenance import current_commit, describe_environment, tensors_digest
from minbert_fast.common.schema import ConfigError, check, plain
from minbert_fast.common.storage import finite, read_json, write_json
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.sampling import subset
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.parallel.world import World, joined
from minbert_fast.recipes.recipe import Recipe, absolute_path
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import flatten, format_score
from minbert_fast.reporting.verdicts import announce
from minbert_fast.step.backends import Backend
from minbert_fast.step.captured import Captures
from minbert_fast.tasks import MultitaskModel, evaluation
from minbert_fast.tasks.unused import unused_values
from minbert_fast.trainer import disk, loop, plan
from minbert_fast.trainer.callbacks import Callback, EndEvent
from minbert_fast.trainer.checkpoint import Checkpoint, CheckpointStore, differences
from minbert_fast.trainer.datasets import load_datasets, names_data
from minbert_fast.trainer.outputs import SUMMARY, RunDirectory, saved_options_path, unused_directory
from minbert_fast.trainer.resume import SHOWN_CHANGES, as_begun, finished_line, fixed_values, settings_of
from minbert_fast.trainer.signals import StopSignals
from minbert_fast.trainer.stages import StageContext, build_stage
from minbert_fast.trainer.trackers import check_trackers, open_trackers

DEMONSTRATION = (
    "This is a demonstration: a tiny model with random weights learns small made-up sample data that ship with the "
    "package. For real results: --data DIR --model DIR"
)
DEVICES = ("auto", "cpu", "cuda")
BackendName = Literal["auto", "fast", "reference"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Options:
    """Settings of a run that are no part of the experiment."""

    output: Path | None = None  # None: a new directory under runs/
    device: str = "auto"
    backend: BackendName = "auto"
    resume: bool = False
    overwrite: bool = False
    stop_after: int | None = None  # cut the run after this many steps, resumed parts included; --resume goes on
    copies: Mapping[tuple[str, str], Path] = field(default_factory=dict)  # (dataset, split) -> second prediction file
    report_to: tuple[str, ...] | None = None  # names of trackers.KNOWN; None: those that a run to resume began with
    rows: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # task -> split -> rows in memory
    callbacks: tuple[Callback, ...] = ()
    command: str = ""  # the command line, for summary.json
    again: str = ""  # the command that continues an interrupted run; empty: train --resume


def train(recipe: Recipe, options: Options) -> Path:
    """Runs `recipe` and returns the output directory.

    Raises ConfigError or DataError for a mistake of the user, RunError or InterruptError for a run that had to stop.
    """
    output = options.output or unused_directory(Path("runs") / recipe.name)
    try:
        with joined(choose_device(options.device)) as (world, device), ExitStack() as stack:
            path = output
            if not world.is_main:  # nobody needs the files of the other ranks
                path = Path(stack.enter_context(TemporaryDirectory(prefix="minbert_fast-rank-"))) / "run"
            files = stack.enter_context(RunDirectory(path))
            _Job(recipe, options, output, files, world, device).run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory outside training steps: choose a smaller model or --set data.max_length"
        ) from error
    return output


@dataclass
class _Job:
    recipe: Recipe
    options: Options
    output: Path  # of rank 0; `files` is another directory on the other ranks
    files: RunDirectory
    world: World
    device: torch.device
    notices: list[str] = field(default_factory=list)  # lines for summary.json

    def run(self) -> None:
        """Loads everything, trains, and writes last/, predictions, summary.json and the report."""
        self._choose_extra_outputs()
        check_trackers(self.report_to)
        self.commit = current_commit()  # read now: the checkout may change during a long run
        backend, precision = self.options.backend, self.recipe.training.precision
        check(backend in BACKENDS, f"backend {backend!r}: expected {', '.join(BACKENDS)}")
        if self.options.resume and (begun := settings_of(self.output)):  # `auto` may mean another precision here
            backend = begun[0] if backend == "auto" else backend
            precision = begun[1] if precision == "auto" else precision
            self.recipe = as_begun(self.recipe, self.output)
        self.precision = choose_precision(precision, self.device)
        self.backend: Backend = "fast" if backend == "auto" else backend
        data = self.recipe.data
        self.own_data = bool(self.options.rows) or names_data(self.recipe)
        self.demonstration = not (self.recipe.model.name or data.directory or data.files or self.own_data)
        if self.world.size > 1 and self.backend == "reference":
            raise ConfigError(f"--backend reference trains in one process, not in {self.world.size}")
        if self.files.holds_run and self.options.overwrite:
            name = self.recipe.model.name
            if name and self.output.resolve() in Path(name).resolve().parents:
                raise ConfigError(f"--overwrite would remove --model {name}; choose another --output")
        elif self.files.holds_run and not self.options.resume:
            raise RunError(f"{self.files.path} holds a run already: --resume continues it, --overwrite replaces it")
        self.recipe = self.recipe.with_paths(absolute_path)  # a run resumed elsewhere finds its files
        if self.options.resume and self._has_ended():
            return
        if self.demonstration:
            self._print(DEMONSTRATION)
        with StopSignals() as signals, signals.interruptible():
            self._load()
        checkpoint = self._find_checkpoint()
        self._check_ranks_agree(checkpoint)  # every rank has read the checkpoint before rank 0 writes anything
        dev_rows = sum(len(table) for table in self.data.dev.values())
        self.room = disk.estimate(self.model, self.recipe, self.stages, dev_rows)
        if self.world.is_main:
            disk.check_room(self.room, self.files.path)
        if self.options.overwrite and self.files.holds_run:  # only now: a mistake in the flags costs no finished run
            self.files.clear()
        copies = [[*key, str(path.absolute())] for key, path in self.copies.items()]
        self.files.prepare(self.recipe.to_toml(), {"report_to": self.report_to, "copies": copies})
        outcome = self._train(checkpoint)
        if self.world.is_main:
            self._write_results(outcome)

    def _choose_extra_outputs(self) -> None:
        """Sets the trackers and the copies of predictions: those of the command line, then those that the run began with."""
        path = saved_options_path(self.output)
        begun = read_json(path) if self.options.resume and path.is_file() else {}
        given = self.options.report_to
        self.report_to: tuple[str, ...] = tuple(begun.get("report_to", ())) if given is None else given
        copies = {(dataset, split): Path(target) for dataset, split, target in begun.get("copies", ())}
        self.copies = {**copies, **self.options.copies}

    def notify(self, line: str) -> None:
        """Prints a line and keeps it for summary.json, once: a cache that cannot be written is one for every file."""
        if line in self.notices:
            return
        self.notices.append(line)
        self._print(line)

    def _print(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    # ---- Loading ----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Loads tokenizer, data and model, and builds the stages."""
        name, data = self.recipe.model.name, self.recipe.data
        if not self.demonstration and not name:
            self.notify("no --model: trains the embedded tiny model, whose weights are random: it cannot learn much")
        if not (self.demonstration or data.directory or data.files or self.own_data):
            self.notify("no --data: trains on the embedded sample of made-up sentences")
        source = weights.resolve(name) if name else sample_directory().model
        self.tokenizer = Tokenizer.from_pretrained(_tokenizer_directory(source))
        if not self.world.is_main:  # rank 0 reads first and fills the cache for the others
            self.world.wait()
        self.data = load_datasets(self.recipe, self.tokenizer, self.notify, self.options.rows)
        if self.world.is_main:
            self.world.wait()
        self.recipe = self.data.recipe
        comparing = [name for name, task in self.data.tasks.items() if task.compares_examples]
        if self.world.size > 1 and comparing:
            self.notify(
                f"the loss of {', '.join(comparing)} compares the examples of a batch: each of the {self.world.size} "
                "processes compares its own, so the steps differ from those of one process"
            )
        dropout = self.recipe.model.dropout
        overrides: dict[str, Any] = {} if dropout is None else dict.fromkeys(DROPOUTS, dropout)
        encoder = BertModel.from_pretrained(source, **overrides)
        self._check_sizes(encoder)
        self.encoder_hash = tensors_digest(encoder.state_dict())
        torch.manual_seed(self.recipe.training.seed)  # for the initial weights of the heads
        self.model = MultitaskModel(encoder, self.data.tasks, self.recipe.model.pooling).to(self.device)
        if (source / "heads.safetensors").is_file():
            self._continue_heads(source)
        elif not all(task.predicts for task in self.data.tasks.values()):  # further pre-training
            for task in self.model.load_pretraining_heads(weights.pretraining_heads(source), str(source)):
                self.notify(f"tasks.{task} starts from the model's own pre-training head")
        self.captures = Captures()
        where = self.device, self.precision, self.backend, self.world
        context = StageContext(self.model, self.tokenizer, self.data.train, *where, self.captures)
        stages = [build_stage(context, self.recipe, i) for i in range(len(self.recipe.resolved_stages()))]
        self.stages = plan.share_steps(stages, self.recipe.training.max_steps)
        for line in dict.fromkeys(line for stage in self.stages for line in unused_values(stage.recipe)):
            self.notify(line)
        self._check_select()
        self._choose_scored_rows()

    def _continue_heads(self, source: Path) -> None:
        """Lets heads start from those of a trained model, and says which did and which did not."""
        copied, reasons = self.model.continue_heads(source)
        anew = "; ".join(f"{name} drawn anew ({reason})" for name, reason in reasons.items())
        kept = f"heads of {', '.join(copied)} continue" if copied else "no head continues"
        self.notify(f"--model {source} is a trained model: {kept}{anew and f'; {anew}'}")

    def _check_sizes(self, encoder: BertModel) -> None:
        config = encoder.config
        pieces, rows = self.tokenizer.vocab_size, config.vocab_size
        check(pieces <= rows, f"the tokenizer has {pieces:,} word pieces, the model only {rows:,}")
        positions, lengths = config.max_position_embeddings, [r.data.max_length for r in self.recipe.resolved_stages()]
        if max(self.recipe.data.max_length, *lengths) > positions:
            data = replace(self.recipe.data, max_length=min(self.recipe.data.max_length, positions))
            self.recipe = replace(self.recipe, data=data)
            self.notify(f"the model has {positions} positions: longer sentences are cut to them")

    def _check_select(self) -> None:
        """Raises ConfigError for an unknown `training.select` now, not at the first evaluation hours later.

        Says which tasks the score leaves out.
        """
        known = ["score"]
        for name in self.data.dev:
            known += [*self.data.tasks[name].metric_names, f"{name}_loss"]
        for recipe in (self.recipe, *(stage.recipe for stage in self.stages)):
            select = recipe.training.select
            check(
                select in known, f"training.select = {select!r}: expected a dev metric of this run: {', '.join(known)}"
            )
        judged = {name: (self.data.tasks[name], self.data.tasks[name].metric_names) for name in self.data.dev}
        course = evaluation.course_tasks(judged)
        others = [name for name, (_, metrics) in judged.items() if metrics and name not in course]
        if course and others:
            self.notify(
                f"score is the course's, of {', '.join(course)} alone: {', '.join(others)} "
                f"{'do' if len(others) > 1 else 'does'} not count (training.select = {self.recipe.training.select!r})"
            )

    def _choose_scored_rows(self) -> None:
        """Draws the dev and training rows that evaluations read, where the recipe wants only a part of them."""
        seed, count = self.recipe.training.seed, self.recipe.training.evaluate_train
        self.dev = dict(self.data.dev)
        for name, table in self.data.dev.items():
            share = self.data.tasks[name].options.dev_fraction
            if share < 1:
                rows = max(1, round(share * len(table)))
                self.dev[name] = table.select(subset(len(table), rows, seed, f"dev/{name}"))
        if not self.dev:
            values = [stage.recipe.training for stage in self.stages]
            useless = {f"training.{k} = {v!r}": None for t in values for k, v in t.needing_evaluations().items()}
            for each in useless:
                self.notify(f"{each} has no effect: without dev rows there are no evaluations")
        train = {n: table for tables in self.data.train for n, table in tables.items() if count and n in self.dev}
        self.scored_train = {n: t.select(subset(len(t), count, seed, f"train/{n}")) for n, t in train.items()}

    # ---- Resuming ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """The values that a resumed run must share with the interrupted one."""
        return {
            "recipe": fixed_values(self.recipe),
            "data": self.data.fingerprint(),
            "model": {"weights": self.encoder_hash, "tokenizer": self.tokenizer.fingerprint},
            "backend": self.backend,
            "precision": self.precision,
        }

    def _has_ended(self) -> bool:
        """Whether the run to resume is finished, so that nothing is left to do."""

        def ask() -> tuple[str | None, str]:  # on rank 0, which has the files
            try:
                return finished_line(self.files.path, self.recipe), ""
            except ConfigError as error:
                return None, str(error)

        line, problem = self.world.from_main(ask)
        if problem:
            raise ConfigError(problem)
        if line is None:
            return False
        if self.world.is_main:
            if not self.files.report_is_current:
                self.files.repair()
                write_report(self.files.path)
            self._prune_checkpoints()
        self._print(line)
        return True

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from, read by every rank. Raises ConfigError if it belongs to another run."""
        if not self.options.resume:
            return None
        checkpoints = self.output / self.files.checkpoints.name
        found = CheckpointStore(checkpoints).newest(self.notify)
        if found is None:
            self.notify(f"no checkpoint in {self.files.path}: starting from the beginning")
            return None
        now = json.loads(json.dumps(self.fingerprint()))  # the checkpoint's went through JSON too
        if changed := differences(found.state["fingerprint"], now):
            more = f" (and {len(changed) - SHOWN_CHANGES} more differences)" if len(changed) > SHOWN_CHANGES else ""
            other = "give --resume alone, or with the flags that the run was started with"
            if all(line.startswith("data.") for line in changed):
                other += "; if a data file has changed since, restore it, or start a new run under another --output"
            raise ConfigError(
                f"{self.files.path} holds a different run: {'; '.join(changed[:SHOWN_CHANGES])}{more}; {other}"
            )
        steps = [stage.steps for stage in self.stages]
        then, stage = found.state.get("steps", steps), found.state["run"]["stage"]
        if then != steps:
            line = f"the run now has {sum(steps):,} steps, not {sum(then):,}"
            if then[:stage] != steps[:stage] or sum(steps) < found.step:
                raise ConfigError(f"{self.files.path}: {line}: a stage that has ended cannot change its length")
            self.notify(f"{line}: its learning rate follows the new length from here on")
        for line in differences(found.state["environment"], describe_environment(self.device)):
            self.notify(f"{line}: results may differ in the last bits from those of an uninterrupted run")
        self.notify(f"resuming after step {found.step}")
        return found

    def _check_ranks_agree(self, checkpoint: Checkpoint | None) -> None:
        """Raises ConfigError if the processes, perhaps on several machines, are about to train different runs."""
        start = "the beginning"
        if checkpoint is not None:
            state = json.dumps(checkpoint.state, sort_keys=True).encode()
            start = f"step {checkpoint.step}, {hashlib.blake2b(state, digest_size=4).hexdigest()}"
        first, *others = self.world.every({"starts from": start, **self.fingerprint()})
        for rank, other in enumerate(others, start=1):
            unlike = differences(first, other, f"{{name}} {{then}} on rank 0, {{now}} on rank {rank}")
            if unlike:
                raise ConfigError(
                    f"cannot train together: {'; '.join(unlike[:SHOWN_CHANGES])}; every machine needs the same data, "
                    f"model and checkpoints in {self.output}"
                )

    # ---- Training and evaluation ------------------------------------------------------------------------------------

    def _train(self, checkpoint: Checkpoint | None) -> loop.Outcome:
        trainer = loop.Trainer(
            recipe=self.recipe,
            stages=self.stages,
            model=self.model,
            files=self.files,
            evaluate=self._evaluate,
            save=self._save,
            constants={
                "fingerprint": self.fingerprint(),
                "environment": describe_environment(self.device),
                "steps": [stage.steps for stage in self.stages],
            },
            judged_by={name: self.data.tasks[name].primary for name in self.dev},
            fetch_every_step=self.device.type == "cpu",
            world=self.world,
            callbacks=self.options.callbacks,
            stop_after=self.options.stop_after,
            again=self.options.again,
        )
        train = {name: table for tables in self.data.train for name, table in tables.items()}
        rows = ", ".join(f"{name} {len(table):,}" for name, table in train.items())
        self._print(
            f"recipe {self.recipe.name}: {trainer.total:,} steps on {self.device.type} in {self.precision}, "
            f"{self.backend} backend; training rows: {rows}; results in {self.files.path} ({self.room})"
        )
        first_step = 0 if checkpoint is None else checkpoint.step
        report_to = self.report_to if self.world.is_main else ()
        with closing(open_trackers(report_to, self.files.path, first_step, flatten(plain(self.recipe)))) as trackers:
            self.files.metrics.on_record = trackers
            return trainer.run(checkpoint)

    def _save(self, directory: Path) -> None:
        self.model.save(directory, self.recipe.to_toml(), self.tokenizer)

    def _evaluate(self) -> plan.Evaluation | None:
        """Scores on the dev files, computed on rank 0; None without dev files."""
        if not self.dev:
            return None
        found: list[evaluation.Evaluation] = []

        def measure() -> tuple[dict[str, float | None], dict[str, float | None]]:
            found.append(self._predict(self.dev))
            train = self._predict(self.scored_train).metrics if self.scored_train else {}
            return finite(found[0].metrics), finite(train)

        def write(directory: Path) -> None:
            texts = {name: table.texts() for name, table in self.dev.items()}
            labels = {name: table.labels for tables in self.data.train for name, table in tables.items()}
            found[0].write(directory, texts, train_labels=labels)

        dev, train = self.world.from_main(measure)
        return plan.Evaluation(dev, write, train)

    def _predict(self, tables: Mapping[str, TokenTable]) -> evaluation.Evaluation:
        return evaluation.evaluate(self.model, tables, precision=self.precision, max_length=self.recipe.data.max_length)

    # ---- Results ----------------------------------------------------------------------------------------------------

    def _write_results(self, outcome: loop.Outcome) -> None:
        self.files.write_directory("last", self._save)
        if outcome.best is None:  # never evaluated
            self.files.write_directory("best", self._save)
        if self.data.test:
            self.model = MultitaskModel.load(self.files.path / "best").to(self.device)
            found = self._predict(self.data.test)
            with translate_write_errors(self.files.path / "predictions"):
                found.write_predictions(self.files.path / "predictions", "test")
        self._copy_predictions()
        self._name_stage_of_best(outcome)
        with translate_write_errors(self.files.path / SUMMARY):
            write_json(self.files.path / SUMMARY, self._summary(outcome))
        if outcome.finished:
            self._prune_checkpoints()
        with translate_write_errors(self.files.path / "report.html"):  # last: a report says that nothing is left to do
            write_report(self.files.path)
        self._print("\n".join(filter(None, [announce(self.files.path), _format_outcome(outcome, self.files.path)])))
        end = EndEvent(outcome.state.step, outcome.reason, (outcome.best or {}).get("metrics", {}), self.files.path)
        for callback in self.options.callbacks:
            callback.on_end(end)

    def _name_stage_of_best(self, outcome: loop.Outcome) -> None:
        """Says so if best/ has not seen the last stage."""
        best, last = outcome.best, outcome.state.stage
        stage = last if best is None else best.get("stage", last)
        if best is not None and stage < last:
            self.notify(
                f"best/ is of step {best['step']}, in stage {stage + 1} of {len(self.stages)}: no later evaluation had a "
                f"better {self.recipe.training.select}; last/ is the model of the last step"
            )

    def _prune_checkpoints(self) -> None:
        """Removes the checkpoints that a finished run does not keep."""
        with translate_write_errors(self.files.checkpoints):
            CheckpointStore(self.files.checkpoints).prune(self.recipe.checkpoint.keep)

    def _copy_predictions(self) -> None:
        """Copies prediction files to the paths of the course's flags (`--sst_dev_out FILE`, ...)."""
        for (dataset, split), target in self.copies.items():
            tasks = [t for t in self.data.tasks.values() if any(source.layout == dataset for source in t.sources)]
            files = [self.files.path / "predictions" / task.prediction_file(split) for task in tasks]
            written = [file for file in files if file.exists()]
            for file in written:
                with translate_write_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
            if not written:
                self.notify(f"{target}: not written, the run has no {split} predictions of {dataset}")

    def _summary(self, outcome: loop.Outcome) -> dict[str, Any]:
        """The content of summary.json."""
        state, best = outcome.state, outcome.best
        return {
            "dev": {} if best is None else best["metrics"],
            **({} if best is None or "train" not in best else {"train": best["train"]}),
            **({"best_per_task": outcome.task_best} if outcome.task_best else {}),
            "untrained": state.untrained,
            "best": None if best is None else {key: best[key] for key in ("step", "score")},
            "steps": state.step,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "skipped_steps": state.skipped_steps,
            "ended": outcome.reason,
            "finished": outcome.finished,
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


def _tokenizer_directory(source: Path) -> Path:
    """The directory of a model's tokenizer files. Raises ConfigError for a `.pt` file without a vocab.txt next to it."""
    if source.is_dir():
        return source
    if not any((source.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ConfigError(f"{source}: no vocab.txt next to it; expected the one of the weights it was trained from")
    return source.parent


def _format_outcome(outcome: loop.Outcome, path: Path) -> str:
    """The last lines of a run: length, dev scores before its first step and after training, and the files."""
    state, best = outcome.state, outcome.best
    lines = [f"{outcome.reason}: {state.step:,} steps, {state.tokens:,} tokens, {state.seconds:.0f} s"]
    if state.skipped_steps:
        tasks = ", ".join(f"{task} {count:,}" for task, count in state.skipped.items())
        lines.append(f"skipped steps, whose loss or gradient was not finite: {state.skipped_steps:,} ({tasks})")
    if best is not None:
        before = state.untrained or {}
        metrics = best["metrics"]
        width = max(len(name) for name in metrics)
        lines.append(f"{'dev':{width}}  {'before':>9}  best (step {best['step']})")
        lines += [f"{n:{width}}  {format_score(before.get(n)):>9}  {format_score(metrics[n])}" for n in metrics]
    for task, kept in outcome.task_best.items():
        lines.append(f"best-{task}/, step {kept['step']}: {format_score(kept['score'])} on dev")
    lines.append(f"{path}: best/ and last/ (models), summary.json, metrics.jsonl, predictions/, report.html")
    return "\n".join(lines)
