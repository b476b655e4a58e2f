"""The leaderboard: versions ranked among those that were measured on the same held-out rows by the same scorer."""

from __future__ import annotations

from collections import defaultdict

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import TunesmithError
from tunesmith.core.values import View
from tunesmith.evaluation.compare import compare, scored_alike, side_of_digest
from tunesmith.evaluation.report.approach_ladder import approach_of
from tunesmith.records.evaluation import AnswerPrice, EvaluationBody, MetricInterval
from tunesmith.records.verdict import VerdictBody
from tunesmith.registry.versions import Version, list_aliases, list_versions
from tunesmith.store.records import recalled
from tunesmith.store.store import Store


class BoardRow(MetricInterval):
    """A version on a board: its mean by the board's metric, and its paired difference from the first (behind)."""

    version: str
    digest: str
    created_at: str
    alias: str | None
    candidate: str
    approach: str
    verdict: str
    recalled: str | None
    price: AnswerPrice
    behind: MetricInterval | None = None


class Board(View):
    """Versions of one name, measured by one metric on the same rows; the best first. dataset: its digest.

    evaluation: that of the best, where another board differs from this one in the metric's scorer alone.
    """

    name: str
    dataset: str
    metric: str
    n: int
    evaluation: str | None = None
    versions: tuple[BoardRow, ...]

    @property
    def title(self) -> str:
        """A board's title, one line."""
        told = f"{self.name}: {self.metric} on {self.n} held-out requests of dataset {short(self.dataset)}"
        return told if self.evaluation is None else f"{told}, scored as in evaluation {short(self.evaluation)}"


class Leaderboard(View):
    """One board for each name, dataset version, leading metric and scorer. The board with the newest version comes
    first."""

    boards: tuple[Board, ...]


def leaderboard(store: Store, name: str | None = None) -> Leaderboard:
    """Rank the versions of a name, or of every name."""
    entries: defaultdict[tuple[str, str, str], list[list[tuple[Version, BoardRow]]]] = defaultdict(list)
    serving = {alias.version: alias.alias for alias in list_aliases(store)}
    for version in list_versions(store, name):
        record = store.record(version.evaluation, kind="evaluation")
        body = EvaluationBody.of(record)
        metric = body.primary
        row = _row(store, version, body, serving.get(version.digest))
        boards_of = entries[version.name, record.parents["dataset"], metric]
        alike = (
            rows for rows in boards_of if scored_alike(EvaluationBody.read(store, rows[0][0].evaluation), body, metric)
        )
        if (rows := next(alike, None)) is not None:
            rows.append((version, row))
        else:
            boards_of.append([(version, row)])
    boards = [
        _board(store, key, rows, alone=len(boards_of) == 1) for key, boards_of in entries.items() for rows in boards_of
    ]
    newest = sorted(boards, key=lambda board: max(row.created_at for row in board.versions), reverse=True)
    return Leaderboard(boards=tuple(newest))


def _board(store: Store, key: tuple[str, str, str], rows: list[tuple[Version, BoardRow]], *, alone: bool) -> Board:
    """alone: whether no other board has the same name, dataset and metric (key)."""
    owner, dataset, metric = key
    rows = sorted(rows, key=lambda row: (-row[1].mean, row[0].number))
    best, ranked = rows[0][0], [rows[0][1]]
    for version, row in rows[1:]:
        ranked.append(row.model_copy(update={"behind": _behind(store, version, best, metric)}))
    n = EvaluationBody.read(store, best.evaluation).n
    shown = None if alone else best.evaluation
    return Board(name=owner, dataset=dataset, metric=metric, n=n, evaluation=shown, versions=tuple(ranked))


def _row(store: Store, version: Version, body: EvaluationBody, alias: str | None) -> BoardRow:
    verdict = VerdictBody.read(store, version.verdict)
    stated = next(one for one in body.candidates.values() if one.candidate == version.candidate)
    with store.reading() as session:
        withdrawn = recalled(session, version.digest)
    return BoardRow(
        version=version.label,
        digest=version.digest,
        created_at=version.created_at,
        alias=alias,
        candidate=verdict.name,
        approach=approach_of(store, load_candidate(store, version.candidate)),
        verdict=verdict.verdict,
        recalled=withdrawn,
        price=stated.price,
        **dict(stated.metrics[body.primary]),
    )


def _behind(store: Store, version: Version, best: Version, metric: str) -> MetricInterval | None:
    """The paired difference, version minus best, on the same rows; None if their scores cannot be paired."""
    sides = [side_of_digest(store, one.evaluation, one.candidate, one.label) for one in (best, version)]
    try:
        return compare(store, *sides).metrics[metric].difference
    except (TunesmithError, KeyError):
        return None
