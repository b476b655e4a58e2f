"""What `import tunesmith` offers to Python: a project, and the whole chain in one call."""

from __future__ import annotations

from typing import Any

from tunesmith import pipeline, project
from tunesmith.core.progress import SILENT, Progress


class Project(project.Project):
    """`Project.load("tunesmith.yaml").run()`; the stages by themselves are plain functions of their folders."""

    def run(self, progress: Progress = SILENT, actor: str | None = None) -> dict[str, Any]:
        """The whole chain up to a registered version; returns what `tunesmith run --json` prints."""
        return pipeline.run(self, progress, actor=actor)
