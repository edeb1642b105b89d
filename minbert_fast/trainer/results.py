# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind when its training has ended: models, test predictions, summary.json, the report, last lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minbert_fast.common.device import peak_memory
from minbert_fast.common.errors import translate_write_errors
from minbert_fast.common.provenance import describe_environment
from minbert_fast.common.storage import write_json
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import format_score
from minbert_fast.reporting.verdicts import announce
from minbert_fast.tasks import MultitaskModel, Task
from minbert_fast.tasks.inference import evaluation
from minbert_fast.trainer.checkpoint import CheckpointStore
from minbert_fast.trainer.loading import Loaded, Setting
from minbert_fast.trainer.loop import Outcome
from minbert_fast.trainer.outputs import SUMMARY, RunDirectory

Copies = Mapping[tuple[str, str], Path]  # (dataset, split) -> second prediction file


def write_results(
    setting: Setting, loaded: Loaded, files: RunDirectory, outcome: Outcome, copies: Copies, command: str
) -> None:
    """Writes everything and prints the last lines. Raises RunError if the disk refuses."""
    files.write_directory("last", loaded.save)
    if outcome.best is None:  # never evaluated
        files.write_directory("best", loaded.save)
    if loaded.data.test:
        model = MultitaskModel.load(files.path / "best").to(setting.device)
        limits: dict[str, Any] = {"precision": setting.precision, "max_length": loaded.recipe.data.max_length}
        found = evaluation.evaluate(model, loaded.data.test, **limits)
        with translate_write_errors(files.path / "predictions"):
            found.write_predictions(files.path / "predictions", "test")
    copy_predictions(loaded.data.tasks, files, copies, setting.notify)
    _name_stage_of_best(setting, loaded, outcome)
    with translate_write_errors(files.path / SUMMARY):
        write_json(files.path / SUMMARY, _summary(setting, loaded, outcome, command))
    if outcome.finished:
        CheckpointStore(files.checkpoints).prune(loaded.recipe.checkpoint.keep)
    with translate_write_errors(files.path / "report.html"):  # last: a report says that nothing is left to do
        write_report(files.path)
    setting.print("\n".join(filter(None, [announce(files.path), format_outcome(outcome, files.path)])))


def copy_predictions(
    tasks: Mapping[str, Task], files: RunDirectory, copies: Copies, notify: Callable[[str], None]
) -> None:
    """Copies prediction files to the paths of the course's flags (`--sst_dev_out FILE`, ...)."""
    for (dataset, split), target in copies.items():
        found = [task for task in tasks.values() if any(source.layout == dataset for source in task.sources)]
        paths = [files.path / "predictions" / task.prediction_file(split) for task in found]
        written = [path for path in paths if path.exists()]
        for path in written:
            with translate_write_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        if not written:
            notify(f"{target}: not written, the run has no {split} predictions of {dataset}")


def _name_stage_of_best(setting: Setting, loaded: Loaded, outcome: Outcome) -> None:
    """Says so if best/ has not seen the last stage."""
    best = outcome.best
    if best is not None and best["stage"] < outcome.state.stage:
        stage = f"stage {best['stage'] + 1} of {len(loaded.stages)}"
        setting.notify(
            f"best/ is of step {best['step']}, in {stage}: no later evaluation had a better "
            f"{loaded.recipe.training.select}; last/ is the model of the last step"
        )


def _summary(setting: Setting, loaded: Loaded, outcome: Outcome, command: str) -> dict[str, Any]:
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
        "recipe": loaded.recipe.name,
        "description": loaded.recipe.description,
        "demonstration": setting.demonstration,
        "backend": setting.backend,
        **describe_environment(setting.device),
        "precision": setting.precision,
        "timings": state.timings,
        "peak_memory_bytes": peak_memory(setting.device),
        "graphs": asdict(loaded.captures),
        "notices": setting.notices,
        "command": command,
        "commit": setting.commit,
    }


def format_outcome(outcome: Outcome, path: Path) -> str:
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
