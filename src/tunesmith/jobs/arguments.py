"""The arguments of a job that runs a project: its settings by their digest, and what one run changes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.values import changed
from tunesmith.project import Project
from tunesmith.store.tables import JobRow

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


def with_changes(project: Project, changes: Changes) -> Project:
    """The project of one run. Epochs replace a budget, and a budget replaces epochs.

    Raises UsageError for what may not be changed, and for values that are not valid.
    """
    candidates = dict(project.settings.candidates)
    for name, values in changes.items():
        train = candidates[name].train if name in candidates else None
        if train is None:
            trained = [each for each, candidate in candidates.items() if candidate.train]
            raise UsageError(
                f"no candidate {name[:80]!r} is trained", where="changes", fix=f"name one of {', '.join(trained)}"
            )
        where = f"candidates.{name}.train"
        if unknown := sorted(set(values) - set(CHANGEABLE)):
            raise UsageError(
                f"{unknown[0][:80]!r} cannot be changed for one run",
                where=where,
                fix=f"change one of {', '.join(CHANGEABLE)}; the project file has the other settings",
            )
        stated = {key: _value_of(value) for key, value in values.items()}
        update = {"train": changed(train, stated, where)}
        candidates[name] = candidates[name].model_copy(update=update)
    return project.with_settings(candidates=candidates)


def run_arguments(project: Project, changes: Changes) -> dict[str, Any]:
    """The arguments of a job that takes a project's settings, named by their digest."""
    made, differing = with_changes(project, changes), {}
    for name, values in changes.items():
        before, after = project.settings.candidates[name].train, made.settings.candidates[name].train
        assert before is not None
        others = {
            key: _value_of(value)
            for key, value in values.items()
            if key not in before.model_fields_set or getattr(before, key) != getattr(after, key)
        }
        if others:
            differing[name] = others
    changed = {"changes": differing, "changed_settings": made.settings.digest} if differing else {}
    return {"settings": project.settings.digest, **changed}


def project_of(project: Project, job: JobRow) -> Project:
    """The project of a job, after its changes. Raises UsageError where its settings are not those that it was queued
    with."""
    if project.settings.digest == job.arguments["settings"]:
        made = with_changes(project, job.changes)
        if made.settings.digest == job.arguments.get("changed_settings", made.settings.digest):
            return made
    raise UsageError(
        "the project's settings changed since this job was queued, or their defaults with the version of Tunesmith",
        where=str(project.root / "tunesmith.yaml"),
        fix=NextStep("queue it again, or create another fine-tuning job after a restart", "run", queue=True),
    )


def _value_of(given: int | float | str) -> int | float | str:
    """The number that a text states, else what is given."""
    for kind in (int, float) if isinstance(given, str) else ():
        with contextlib.suppress(ValueError):
            return kind(given)
    return given
