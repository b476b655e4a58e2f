"""Outside test sets and benchmarks, whose rows must not be in a dataset version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tunesmith.core.digests import canonical_lines
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.values import Schema
from tunesmith.data.building.examine import renamed
from tunesmith.data.duplicates import near_text, request_text
from tunesmith.data.formats import row_formats
from tunesmith.data.formats.turns import conversation
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.settings import DataSettings, Rows, Source
from tunesmith.data.sources.files import OpenSource, find_files, open_source
from tunesmith.data.splitting.groups import wording_group
from tunesmith.records.dataset import OutsideSet

OUTSIDE = "outside.jsonl"
_TOGETHER = 2000


class Outside(NamedTuple):
    """What every row is compared with. requests: by near_text; wordings: by wording_group; files: that hold
    them."""

    requests: frozenset[str] = frozenset()
    wordings: frozenset[str] = frozenset()
    files: tuple[OutsideSet, ...] = ()

    def encode(self) -> bytes:
        """Sorted lines of requests and wordings: enough to verify a dataset version without the files."""
        lines = [{"request": text} for text in sorted(self.requests)]
        lines += [{"wording": group} for group in sorted(self.wordings)]
        return canonical_lines(lines)


def decode_outside(data: bytes) -> Outside:
    """The Outside that `encode` wrote. Raises Refused for anything else."""
    try:
        lines = [parse_json(line) for line in data.splitlines()]
        return Outside(
            frozenset(line["request"] for line in lines if "request" in line),
            frozenset(line["wording"] for line in lines if "request" not in line),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{OUTSIDE} does not hold requests: {error}", where=OUTSIDE) from error


def read_outside(settings: DataSettings, root: Path, answer_schema: Schema | None) -> Outside:
    """The requests and wordings of the outside sets that the settings name.

    Which words of a request are values is decided by the row's answer, if it has one, the privacy scan and the
    settings. Raises UsageError for malformed files and rows, and for rows without a user turn.
    """
    if not settings.decontaminate:
        return Outside()
    scanner = Scanner(settings.privacy, answer_schema)
    requests: set[str] = set()
    wordings: set[str] = set()
    files: list[OutsideSet] = []
    for file in find_files(outside_sources(settings.decontaminate), root):
        with open_source(file) as opened:
            rows, conversations = 0, _conversations(opened)
            while some := list(islice(conversations, _TOGETHER)):
                rows += len(some)
                for messages, scan in zip(some, scanner.scan_many(some), strict=True):
                    request, answer = request_text(messages), messages[-1].text
                    requests.add(near_text(request))
                    wordings.add(wording_group(request, answer))
                    wordings.add(wording_group(request, answer, [*settings.split.values, *scan.originals.values()]))
            files.append(OutsideSet(path=file.name, digest=opened.digest, rows=rows))
    return Outside(frozenset(requests), frozenset(wordings), tuple(files))


def _conversations(opened: OpenSource) -> Iterator[Turns]:
    row_format: row_formats.RowFormat | None = None
    for read in opened.rows():
        row = renamed(read, opened.file.source.rename)
        row_format = row_format or row_formats.format_of(opened.file.source.format, row)
        yield conversation(_answered(row_formats.read_turns(row, row_format, Counter()), row.where))


def _answered(turns: Conversation, where: str) -> Conversation:
    """The turns with an answer to learn at their end, which may be empty: many test sets hold requests alone.

    Raises UsageError where no turn is the user's, since the row would be compared with nothing.
    """
    if not any(turn.role == "user" for turn in turns):
        raise UsageError(
            "the row has no user turn to compare rows with",
            where=where,
            fix="remove the row, or name the key of its request with rename",
        )
    if turns[-1].role != "assistant":
        return [*turns, Message(role="assistant", content="")]
    learned = any(turn.role == "assistant" and turn.weight for turn in turns)
    return turns if learned else [*turns[:-1], turns[-1].model_copy(update={"weight": 1})]


def outside_sources(sets: Sequence[Rows]) -> tuple[Source, ...]:
    """The sets as sources of rows. They need no licence, since nothing is learned from them."""
    return tuple(Source(path=one.path, format=one.format, rename=one.rename) for one in sets)
