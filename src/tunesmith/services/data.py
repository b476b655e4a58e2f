"""Dataset versions: build them."""

from __future__ import annotations

from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.building.shards import LocalRunner, ShardRunner
from tunesmith.data.building.summary import DatasetSummary, dataset_summary
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project


def build(project: Project, *, progress: Progress = SILENT, shards: ShardRunner | None = None) -> DatasetSummary:
    """Read, check, clean, split and seal the project's sources. shards: reads the files; this machine by default."""
    digest = PipelineContext(project, progress, shards=shards or LocalRunner()).dataset.digest
    return dataset_summary(project.store, digest)
