"""Test sets and benchmarks from elsewhere, which no dataset version may hold anything of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused
from tunesmith.data import formats
from tunesmith.data.duplicates import near_text, request_text
from tunesmith.data.examine import renamed
from tunesmith.data.settings import Rows, Source
from tunesmith.data.sources import Row, find_files, open_source
from tunesmith.data.splits import wording_group

OUTSIDE = "outside.jsonl"


@dataclass(frozen=True)
class Outside:
    """What is held against every row. requests: near_text; wordings: wording_group; files: path, digest, rows."""

    requests: frozenset[str] = frozenset()
    wordings: frozenset[str] = frozenset()
    files: tuple[dict[str, Any], ...] = ()

    def encode(self) -> bytes:
        """A line a request or wording, sorted: enough to make the proof again without the files."""
        lines = [{"request": text} for text in sorted(self.requests)]
        lines += [{"wording": group} for group in sorted(self.wordings)]
        return b"".join(canonical(line) + b"\n" for line in lines)


def decode_outside(data: bytes) -> Outside:
    """What encode wrote. Raises Refused for anything else."""
    try:
        lines = [json.loads(line) for line in data.splitlines()]
        return Outside(
            frozenset(line["request"] for line in lines if "request" in line),
            frozenset(line["wording"] for line in lines if "request" not in line),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{OUTSIDE} does not hold requests: {error}", where=OUTSIDE) from error


def read_outside(sets: Sequence[Rows], root: Path) -> Outside:
    """Read the sets. A row needs a request; its answer, where it has one, tells which words of it are values.

    Raises UsageError for files and rows that are not well formed.
    """
    requests: set[str] = set()
    wordings: set[str] = set()
    files: list[dict[str, Any]] = []
    for file in find_files(outside_sources(sets), root):
        with open_source(file) as opened:
            shape: formats.Shape | None = None
            rows = 0
            for row in opened.rows():
                rows += 1
                fields = Row(row.source, row.number, renamed(row, file.source.rename))
                shape = shape or formats.shape_of(file.source.format, fields)
                messages = formats.conversation(formats.read_turns(fields, shape, Counter()))
                request = request_text(messages)
                requests.add(near_text(request))
                wordings.add(wording_group(request, messages[-1].text))
            files.append({"path": file.name, "digest": opened.digest, "rows": rows})
    return Outside(frozenset(requests), frozenset(wordings), tuple(files))


def outside_sources(sets: Sequence[Rows]) -> tuple[Source, ...]:
    """The sets as sources of rows. They need no licence: nothing is learned from them."""
    return tuple(Source(path=one.path, format=one.format, rename=one.rename) for one in sets)
