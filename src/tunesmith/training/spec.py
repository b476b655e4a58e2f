"""What a training is given and what it returns: plain data, from which another process or machine can rebuild it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused
from tunesmith.core.system.files import write_atomic
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered
from tunesmith.records.training import Decisions, TrainingBody
from tunesmith.training.settings import MetricsSettings, TrainSettings


class RowsFile(BaseModel, frozen=True):
    """Rendered rows as JSON lines: each row's id, its token ids, and for each of them 1 where it is learned, else 0.

    digest: of the file's bytes.
    """

    path: Path
    digest: str

    def read(self) -> list[Rendered]:
        """The rows. Raises Refused where the file is missing or its bytes changed."""
        if not self.path.is_file() or digest_file(self.path) != self.digest:
            raise Refused(
                "the training's rows are missing or changed", where=str(self.path), fix="start the training again"
            )
        with self.path.open("rb") as stream:
            lines = map(json.loads, stream)
            return [Rendered(tuple(row["tokens"]), tuple(mark == "1" for mark in row["trained"])) for row in lines]


def write_rows(path: Path, ids: Sequence[str], rows: Sequence[Rendered]) -> RowsFile:
    """Write rendered rows under their ids."""
    lines = (
        json.dumps({"id": each, "tokens": row.ids, "trained": "".join("01"[learned] for learned in row.trained)})
        for each, row in zip(ids, rows, strict=True)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return RowsFile(path=path, digest=digest_file(path))


class TrainingSpec(BaseModel, frozen=True):
    """One training.

    name: the candidate's, for messages and curves. engine: which trains. base: the base model, with the folder of its
    files. dataset: digest of the dataset version that the rows come from. work: the training's own folder, for rows,
    checkpoints and the result. splits: of the dataset version, that could be read. metrics: where its curves are shown.
    decisions: those of an earlier training, which this one repeats. notices: what people should know of it, for its
    record. documents: digest of those whose passages the rows' prompts hold.
    """

    name: str
    engine: Literal["native", "hf"]
    base: Base
    dataset: str
    rows: RowsFile
    validation: RowsFile
    settings: TrainSettings
    work: Path
    splits: tuple[str, ...] = ()
    metrics: MetricsSettings | None = None
    decisions: Decisions | None = None
    notices: tuple[str, ...] = ()
    documents: str | None = None


class TrainingResult(BaseModel):
    """A training that has ended. folder: holds the trained model's files and nothing else. body: what its record
    states."""

    folder: Path
    body: TrainingBody
