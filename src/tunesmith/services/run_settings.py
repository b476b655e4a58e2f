"""The settings of one run: the project file's, or with some training settings changed for that run only."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.view import View
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project
from tunesmith.store.tables import JobRow
from tunesmith.training.settings import changed_training

# What a run may change, by candidate: values of keys of `train:`. A text that states a number is that number.
Changes = Mapping[str, Mapping[str, int | float | str]]
# The keys, with what people call them.
CHANGEABLE: Mapping[str, str] = {
    "epochs": "Epochs",
    "budget": "Training time",
    "learning_rate": "Learning rate",
    "rank": "Rank of the adapter",
    "batch": "Rows per step",
    "seed": "Seed",
}


class Setting(View):
    """A training setting that a run may change. value: the project file's, None where a default applies; help: what it
    means."""

    key: str
    label: str
    value: Any
    help: str


class TrainedCandidate(View):
    """A candidate that is trained, and what a run may change of that."""

    name: str
    settings: tuple[Setting, ...]


def read_again(project: Project) -> Project:
    """The project as its file says now. Raises UsageError where that is not valid."""
    made = Project.load(project.root)
    made.store = project.store
    return made


def changeable(project: Project) -> tuple[TrainedCandidate, ...]:
    """The trained candidates of a project, with what a run may change. A training with a budget has no epochs."""
    found = []
    for name, candidate in project.settings.candidates.items():
        if (train := candidate.train) is None:
            continue
        left_out = {"epochs" if train.budget is not None else "budget", *(() if train.method == "lora" else ("rank",))}
        fields, given = type(train).model_fields, train.model_fields_set
        settings = tuple(
            Setting(
                key=key,
                label=label,
                value=getattr(train, key) if key in given else None,
                help=fields[key].description or "",
            )
            for key, label in CHANGEABLE.items()
            if key not in left_out
        )
        found.append(TrainedCandidate(name=name, settings=settings))
    return tuple(found)


def _value_of(given: int | float | str) -> int | float | str:
    """The number that a text states, else what is given."""
    for kind in (int, float) if isinstance(given, str) else ():
        with contextlib.suppress(ValueError):
            return kind(given)
    return given


def with_changes(project: Project, changes: Changes) -> Project:
    """The project of one run. Epochs replace a budget, and a budget replaces epochs.

    Raises UsageError for what may not be changed, and for values that are not valid.
    """
    if not changes:
        return project
    candidates = dict(project.settings.candidates)
    for name, values in changes.items():
        if name not in candidates or (train := candidates[name].train) is None:
            trained = [each for each, candidate in candidates.items() if candidate.train]
            raise UsageError(
                f"no candidate {name[:80]!r} is trained", where="changes", fix=f"name one of {', '.join(trained)}"
            )
        if unknown := sorted(set(values) - set(CHANGEABLE)):
            raise UsageError(
                f"{unknown[0][:80]!r} cannot be changed for one run",
                where=f"candidates.{name}.train",
                fix=f"change one of {', '.join(CHANGEABLE)}; the project file has the other settings",
            )
        stated = {key: _value_of(value) for key, value in values.items()}
        update = {"train": changed_training(train, stated, f"candidates.{name}.train")}
        candidates[name] = candidates[name].model_copy(update=update)
    made = Project(project.root, project.settings.model_copy(update={"candidates": candidates}))
    made.store = project.store
    return made


def run_arguments(project: Project, changes: Changes) -> dict[str, Any]:
    """The arguments of a job that takes a project's settings, named by their digest."""
    found: dict[str, Any] = {"settings": project.settings.digest}
    made = with_changes(project, changes)
    if differing := _differing(project, made, changes):
        found |= {"changes": differing, "changed_settings": made.settings.digest}
    return found


def _differing(project: Project, made: Project, changes: Changes) -> dict[str, dict[str, Any]]:
    """The changes to another value than the one that the project file has."""
    found = {}
    for name, values in changes.items():
        before, after = project.settings.candidates[name].train, made.settings.candidates[name].train
        assert before is not None
        found[name] = {
            key: _value_of(value)
            for key, value in values.items()
            if key not in before.model_fields_set or getattr(before, key) != getattr(after, key)
        }
    return {name: values for name, values in found.items() if values}


def project_of(project: Project, job: JobRow) -> Project:
    """The project of a job, after its changes. Raises UsageError where its settings are not those that it was queued
    with."""
    if project.settings.digest == job.arguments["settings"]:
        made = with_changes(project, job.arguments.get("changes", {}))
        if made.settings.digest == job.arguments.get("changed_settings", made.settings.digest):
            return made
    raise UsageError(
        "the project's settings changed since this job was queued, or their defaults with tunesmith's version",
        where=str(project.root / "tunesmith.yaml"),
        fix="queue it again: `tunesmith run --queue`. For a fine-tuning job, restart `tunesmith serve` and create "
        "another one",
    )


def only_tuned(project: Project) -> str:
    """The name of the only candidate that is trained. Raises UsageError where there is none, or more than one."""
    tuned = tuned_names(project)
    if len(tuned) != 1:
        raise UsageError(f"{len(tuned)} candidates are trained", fix=f"name one: {', '.join(tuned) or 'none is'}")
    return tuned[0]
