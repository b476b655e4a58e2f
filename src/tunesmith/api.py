"""What `import tunesmith` offers to Python: a project, and the whole pipeline in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith import project
from tunesmith.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from tunesmith.pipeline.run import RunSummary


class Project(project.Project):
    """`Project.load("tunesmith.yaml").run()`. `tunesmith.services` has a function for every other action.

    Such as `rollouts.promote(acting_in(project), rollouts.PromoteRollout(rollout="intents"))`; `acting_in` is in
    `tunesmith.services.actions`.
    """

    def run(self, progress: Progress = SILENT, actor: str | None = None) -> RunSummary:
        """Run every stage up to a registered version; `.document()` is what `tunesmith run --json` prints.

        actor: who signs; by default $TUNESMITH_USER, else the store's owner.
        """
        from tunesmith.pipeline.run import run

        return run(self, progress=progress, actor=actor)
