# SPDX-License-Identifier: Apache-2.0
"""A whole training run: from a recipe to an output directory with the trained model, its scores and a report.

`train` settles the run's conditions, loads what it works on (loading.py), trains (loop.py) and writes the results
(results.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from minbert_fast.common.device import choose_device, choose_precision
from minbert_fast.common.errors import RunError, is_out_of_memory
from minbert_fast.common.provenance import current_commit, describe_environment, tensors_digest
from minbert_fast.common.schema import ConfigError, check, plain
from minbert_fast.common.storage import finite, read_json
from minbert_fast.parallel.world import World, joined
from minbert_fast.recipes.recipe import Recipe, absolute_path
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import flatten
from minbert_fast.tasks import build_tasks
from minbert_fast.tasks.inference import evaluation
from minbert_fast.trainer import disk, loop, plan
from minbert_fast.trainer.callbacks import Callback, EndEvent
from minbert_fast.trainer.checkpoint import Checkpoint, CheckpointStore
from minbert_fast.trainer.loading import Loaded, Setting, load
from minbert_fast.trainer.outputs import RunDirectory, saved_options_path, saved_recipe_path, unused_directory
from minbert_fast.trainer.results import copy_predictions, write_results
from minbert_fast.trainer.resume import as_begun, check_ranks_agree, find_checkpoint, finished_line, settings_of
from minbert_fast.trainer.signals import StopSignals
from minbert_fast.trainer.trackers import check_trackers, open_trackers

DEMONSTRATION = (
    "This is a demonstration: a tiny model with random weights learns small made-up sample data that ship with the "
    "package. For real results: --data DIR --model DIR"
)
DEVICES = ("auto", "cpu", "cuda")
BackendName = Literal["auto", "fast", "reference"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


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
    try:
        with joined(choose_device(options.device)) as (world, device), ExitStack() as stack:
            if torch.get_default_device().type != "cpu":  # a run places its tensors itself
                stack.enter_context(torch.device("cpu"))
            output = world.from_main(lambda: options.output or unused_directory(Path("runs") / recipe.name))
            path = output
            if not world.is_main:  # nobody needs the files of the other ranks
                path = Path(stack.enter_context(TemporaryDirectory(prefix="minbert_fast-rank-"))) / "run"
            files = stack.enter_context(RunDirectory(path, output))
            _run(recipe, options, output, files, world, device)
            world.wait()  # until rank 0 has written the results, which a caller of `fit` reads
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory outside training steps: choose a smaller model or --set data.max_length"
        ) from error
    return output


def _run(
    recipe: Recipe, options: Options, output: Path, files: RunDirectory, world: World, device: torch.device
) -> None:
    """Loads everything, trains, and writes the results. `output` is rank 0's; the other ranks' `files` are elsewhere."""
    options = _with_extra_outputs(options, output)
    setting = _settle(recipe, options, output, world, device)
    _check_output(setting, options, output, files)
    if _has_ended(setting, options, files):
        return
    if setting.demonstration:
        setting.print(DEMONSTRATION)
    with StopSignals() as signals, signals.interruptible():
        loaded = load(setting)
    checkpoint = None
    if options.resume:
        steps = [stage.steps for stage in loaded.stages]
        checkpoint = find_checkpoint(output, loaded.fingerprint, steps, device, setting.notify, rename=world.is_main)
    check_ranks_agree(world, partial(_conditions, loaded, options), checkpoint, output)  # before rank 0 writes anything
    room = disk.estimate(loaded.model, loaded.recipe, loaded.stages, sum(map(len, loaded.data.dev.values())))
    if world.is_main:
        disk.check_room(room, files.path)
    if options.overwrite and files.holds_run:  # only now: a mistake in the flags costs no finished run
        files.clear()
    copies = [[*key, str(path.absolute())] for key, path in options.copies.items()]
    files.prepare(loaded.recipe.to_toml(), {"report_to": options.report_to, "copies": copies})
    outcome = _train(setting, loaded, options, files, checkpoint, room)
    if world.is_main:
        write_results(setting, loaded, files, outcome, options.copies, options.command)
        end = EndEvent(outcome.state.step, outcome.reason, (outcome.best or {}).get("metrics", {}), files.path)
        for callback in options.callbacks:
            callback.on_end(end)


def _with_extra_outputs(options: Options, output: Path) -> Options:
    """Adds the trackers and copies of predictions that a run to resume began with. Raises ConfigError for wrong ones."""
    path = saved_options_path(output)
    begun = read_json(path) if options.resume and path.is_file() else {}
    report_to = tuple(begun.get("report_to", ())) if options.report_to is None else options.report_to
    check_trackers(report_to)
    copies = {(dataset, split): Path(target) for dataset, split, target in begun.get("copies", ())}
    return replace(options, report_to=report_to, copies={**copies, **options.copies})


def _settle(recipe: Recipe, options: Options, output: Path, world: World, device: torch.device) -> Setting:
    """The conditions of the run. Raises ConfigError for options that cannot be carried out."""
    commit = current_commit()  # read now: the checkout may change during a long run
    backend, precision = options.backend, recipe.training.precision
    check(backend in BACKENDS, f"backend {backend!r}: expected {', '.join(BACKENDS)}")
    if options.resume and (begun := settings_of(output)):  # `auto` may mean another precision here
        backend = begun[0] if backend == "auto" else backend
        precision = begun[1] if precision == "auto" else precision
        recipe = as_begun(recipe, output)
    return Setting(
        recipe=recipe.with_paths(absolute_path),  # a run resumed elsewhere finds its files
        rows=options.rows,
        world=world,
        device=device,
        backend="fast" if backend == "auto" else backend,
        precision=choose_precision(precision, device),
        commit=commit,
    )


def _check_output(setting: Setting, options: Options, output: Path, files: RunDirectory) -> None:
    """Raises ConfigError or RunError if the run would not do what its options ask, or would remove another one."""
    if setting.world.size > 1 and setting.backend == "reference":
        raise ConfigError(f"--backend reference trains in one process, not in {setting.world.size}")
    if files.holds_run and options.overwrite:
        name = setting.recipe.model.name
        if name and output.resolve() in Path(name).resolve().parents:
            raise ConfigError(f"--overwrite would remove --model {name}; choose another --output")
    elif files.holds_run and not options.resume:
        raise RunError(f"{files.path} holds a run already: --resume continues it, --overwrite replaces it")


def _has_ended(setting: Setting, options: Options, files: RunDirectory) -> bool:
    """Whether rank 0 is to resume a run that is finished, so that only copies of its predictions are left to write."""

    def ask() -> tuple[str | None, str]:  # on rank 0, which has the files
        try:
            return finished_line(files.path, setting.recipe) if options.resume else None, ""
        except ConfigError as error:
            return None, str(error)

    line, problem = setting.world.from_main(ask)
    if problem:
        raise ConfigError(problem)
    if line is None:
        return False
    if setting.world.is_main:
        if not files.report_is_current:
            files.repair()
            write_report(files.path)
        CheckpointStore(files.checkpoints).prune(setting.recipe.checkpoint.keep)
        tasks = build_tasks(Recipe.load(str(saved_recipe_path(files.path))))
        copy_predictions(tasks, files, options.copies, setting.notify)
    setting.print(line)
    return True


def _conditions(loaded: Loaded, options: Options) -> dict[str, Any]:
    """What all processes must share: those of a resumed run, and values that it may change.

    Processes that differ in them would wait for each other for hours.
    """
    recipe, model = loaded.fingerprint["recipe"], loaded.fingerprint["model"]
    return {
        "--stop-after": options.stop_after,
        **loaded.fingerprint,
        "recipe": recipe
        | {name: plain(getattr(loaded.recipe, name)) for name in ("training", "checkpoint", "logging")},
        "model": model | {"heads": tensors_digest(loaded.model.heads.state_dict())[:8]},
    }


def _train(
    setting: Setting,
    loaded: Loaded,
    options: Options,
    files: RunDirectory,
    checkpoint: Checkpoint | None,
    room: disk.Room,
) -> loop.Outcome:
    recipe, data, world, device = loaded.recipe, loaded.data, setting.world, setting.device
    train = {name: table for tables in data.train for name, table in tables.items()}
    rows = ", ".join(f"{name} {len(table):,}" for name, table in train.items())
    steps = [stage.steps for stage in loaded.stages]
    setting.print(
        f"recipe {recipe.name}: {sum(steps):,} steps on {device.type} in {setting.precision}, "
        f"{setting.backend} backend; training rows: {rows}; results in {files.path} ({room})"
    )
    first_step = 0 if checkpoint is None else checkpoint.step
    environment = describe_environment(device)
    report_to = (options.report_to or ()) if world.is_main else ()
    with closing(open_trackers(report_to, files.path, first_step, flatten(plain(recipe)))) as trackers:
        files.metrics.on_record = trackers
        return loop.Trainer(
            recipe=recipe,
            stages=loaded.stages,
            model=loaded.model,
            files=files,
            evaluate=partial(_evaluate, setting, loaded),
            save=loaded.save,
            constants={"fingerprint": loaded.fingerprint, "environment": environment, "steps": steps},
            checkpoint=checkpoint,
            judged_by={name: data.tasks[name].primary for name in loaded.dev},
            fetch_every_step=device.type == "cpu",
            world=world,
            callbacks=options.callbacks,
            stop_after=options.stop_after,
            again=options.again,
        ).run()


def _evaluate(setting: Setting, loaded: Loaded) -> plan.Evaluation | None:
    """Scores on the dev files; None without dev files."""
    if not loaded.dev:
        return None
    max_length = loaded.recipe.data.max_length
    score = partial(evaluation.evaluate, loaded.model, precision=setting.precision, max_length=max_length)
    found = score(loaded.dev)
    train = score(loaded.scored_train).metrics if loaded.scored_train else {}

    def write(directory: Path) -> None:
        texts = {name: table.texts() for name, table in loaded.dev.items()}
        labels = {name: table.labels for tables in loaded.data.train for name, table in tables.items()}
        found.write(directory, texts, train_labels=labels)

    return plan.Evaluation(finite(found.metrics), write, finite(train))
