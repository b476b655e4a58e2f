"""The matrix of an evaluation: every held-out request by every candidate, to be filtered and read request by request.

Whoever reads it sees only what their tenant, region and groups let them see: rows of another tenant are left out, and
an answer that was made with a document or a row that they may not see is withheld, because it may repeat it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.access import ANYONE, Caller, Labels
from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.data.documents import Documents
from tunesmith.evaluation.lines import AnswerLines
from tunesmith.evaluation.metrics.classification import read_labels
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import VALID
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.store.store import Store

Show = Literal["all", "flips", "wins", "losses", "invalid", "long"]
Change = Literal["loss", "win", "differs", "same"]
CHANGES: tuple[Change, ...] = ("loss", "win", "differs", "same")  # in the order in which the matrix shows them
_VALIDITY = ("json_valid", VALID)  # metrics that say whether an answer has the form that the task asks for
_LONG_SHARE = 0.9  # a request is long if it is longer than this share of them
_SELECTIONS = 64  # that are remembered: one for each filter and reader
_MOST_LABELS = 200


class Reader(NamedTuple):
    """Who reads: their scope, for rows; and the caller that documents' labels are compared with."""

    scope: Scope = Scope()
    caller: Caller = ANYONE


class Retrieved(NamedTuple):
    """A passage or a training row that a candidate retrieved. title: the headings above a passage.

    labels: of a passage's document. owner: the tenant and region that a row states.
    """

    source: str
    title: str
    text: str
    labels: Labels = Labels()
    owner: tuple[str, str] = ("", "")

    def visible_to(self, reader: Reader) -> bool:
        """Whether a reader may see it."""
        return self.labels.visible_to(reader.caller) and _concerns(self.owner, reader.scope)


class Filter(NamedTuple):
    """Which requests of a matrix, compared how. focus, rival: candidates; a win is a request where the focus is better.

    show: invalid and long are about the focus's answers; long also takes the longest tenth of the requests. group: the
    start of a group's name. label: `key=value` of a row. search: text of a request, a reference or an answer, in any
    case. "" leaves group, label or search out.
    """

    focus: str
    rival: str
    metric: str
    show: Show = "all"
    group: str = ""
    label: str = ""
    search: str = ""


class Sight(NamedTuple):
    """What one reader may see. rows: places of visible rows; withheld: candidate -> places of answers they may not.

    labels: the most frequent labels of visible rows, with how many rows each has, by name.
    """

    rows: NDArray[np.intp]
    withheld: Mapping[str, frozenset[int]]
    labels: Sequence[tuple[str, int]]


class Selected(NamedTuple):
    """The places of the chosen rows, in the order shown: losses, wins, other differences, the rest.

    counts: of each change among all rows that the reader may see, whatever is filtered.
    """

    places: NDArray[np.intp]
    counts: Mapping[Change, int]


class Matrix:
    """An evaluation's rows, scores and answers in memory. Records never change, so it can be kept.

    rows: held-out rows by id. scores: (candidate, metric) -> a value for each row. lines: candidate -> a line of its
    answers record for each row, read when it is looked at: most are never shown.

    Raises Inconclusive for scores that do not fit the rows, and for answers that do not when they are looked at.
    """

    def __init__(self, store: Store, evaluation: str) -> None:
        record = store.record(evaluation, kind="evaluation")
        self._store = store
        self.dataset = record.parents["dataset"]
        self.rows: list[Example] = load_dataset(store, self.dataset).examples("test")
        self.place = {row.id: place for place, row in enumerate(self.rows)}
        columns = read_scores(store, record)
        body = EvaluationBody.of(record)
        self.metrics, self.primary = body.metrics, body.primary
        self._validity = next((metric for metric in _VALIDITY if metric in self.metrics), None)
        self.candidates: dict[str, Candidate] = {
            name: load_candidate(store, stated.candidate) for name, stated in body.candidates.items()
        }
        self.scores: dict[tuple[str, str], Floats] = {
            (name, metric): columns[name, metric].values for name in self.candidates for metric in self.metrics
        }
        self.lines: dict[str, AnswerLines] = {}
        for name in self.candidates:
            answers = store.record(record.parents[f"answers:{name}"], kind="answers")
            self.lines[name] = AnswerLines(store, answers, list(self.place), f"answers of {name!r}")
        self.labelled = read_labels(store, record, columns)
        self.retrieved = {name: self._retrieved(name, candidate) for name, candidate in self.candidates.items()}
        self.sight = lru_cache(_SELECTIONS)(self._sight)
        self.select = lru_cache(_SELECTIONS)(self._select)

    def valid(self, name: str, place: int) -> bool | None:
        """Whether an answer has the form that the task asks for; None where no metric says so."""
        metric = self._validity
        return None if metric is None else bool(self.scores[name, metric][place] == 1.0)

    @property
    def measures_form(self) -> bool:
        """Whether a metric says that answers are invalid."""
        return self._validity is not None

    def cut(self, name: str, place: int) -> bool:
        """Whether an answer reached the longest length that the candidate allows."""
        return bool(self.lines[name][place].get("finish") == "length")

    def changes(self, focus: str, rival: str, metric: str) -> NDArray[np.intp]:
        """For each row the place of its change in CHANGES."""
        gap = self.scores[focus, metric] - self.scores[rival, metric]
        every = np.stack([self.scores[name, metric] for name in self.candidates])
        differs = every.max(axis=0) > every.min(axis=0)
        return np.select([gap < 0, gap > 0, differs], [0, 1, 2], 3).astype(np.intp)

    def labels_of(self, place: int) -> list[str]:
        """`key=value` for what the row states, and for the right label of each metric that compares labels."""
        stated = [f"{key}={value}" for key, value in sorted(self.rows[place].labels.items())]
        wanted = {metric: labels.wanted[place] for (_, metric), labels in self.labelled.items()}
        return stated + [f"{metric}={value}" for metric, value in sorted(wanted.items())]

    @cached_property
    def _long(self) -> NDArray[np.bool_]:
        lengths = np.array([len(_asked(row)) for row in self.rows], dtype=np.float64)
        return lengths > np.quantile(lengths, _LONG_SHARE) if len(lengths) else np.zeros(0, dtype=np.bool_)

    def _sight(self, reader: Reader) -> Sight:
        rows = [place for place, row in enumerate(self.rows) if _concerns(_owner(row), reader.scope)]
        withheld = {}
        for name, retrieved in self.retrieved.items():
            hidden = {identifier for identifier, one in retrieved.items() if not one.visible_to(reader)}
            lines = enumerate(self.lines[name]) if hidden else ()
            withheld[name] = frozenset(
                place for place, line in lines if not hidden.isdisjoint(line.get("retrieved", ()))
            )
        counted = Counter(label for place in rows for label in self.labels_of(place))
        return Sight(np.array(rows, dtype=np.intp), withheld, sorted(counted.most_common(_MOST_LABELS)))

    def _select(self, chosen: Filter, reader: Reader) -> Selected:
        for what, named, known in (
            ("candidate", chosen.focus, self.candidates),
            ("candidate", chosen.rival, self.candidates),
            ("metric", chosen.metric, self.metrics),
            ("choice of requests", chosen.show, get_args(Show)),
        ):
            if named not in known:
                raise UsageError(f"the evaluation has no {what} {named[:80]!r}", fix=f"name one of: {', '.join(known)}")
        sight = self.sight(reader)
        changes = self.changes(chosen.focus, chosen.rival, chosen.metric)
        gap = np.abs(self.scores[chosen.focus, chosen.metric] - self.scores[chosen.rival, chosen.metric])
        counts = np.bincount(changes[sight.rows], minlength=len(CHANGES)).tolist()
        kept = [place for place in sight.rows.tolist() if self._fits(place, changes[place], chosen, sight)]
        places = np.array(kept, dtype=np.intp)
        ordered = places[np.lexsort((places, -gap[places], changes[places]))]
        return Selected(ordered, dict(zip(CHANGES, counts, strict=True)))

    def _fits(self, place: int, change: int, chosen: Filter, sight: Sight) -> bool:
        return (
            self._shows(place, change, chosen)
            and self.rows[place].group.startswith(chosen.group)
            and (not chosen.label or chosen.label in self.labels_of(place))
            and (not chosen.search or self._holds(place, chosen.search.casefold(), sight))
        )

    def _shows(self, place: int, change: int, chosen: Filter) -> bool:
        if chosen.show == "invalid":
            return self.valid(chosen.focus, place) is False
        if chosen.show == "long":
            return bool(self._long[place]) or self.cut(chosen.focus, place)
        return {"all": True, "flips": change < 2, "losses": change == 0, "wins": change == 1}[chosen.show]

    def _holds(self, place: int, text: str, sight: Sight) -> bool:
        """Whether a row, or an answer to it that the reader may see, contains a text in any case."""
        row = self.rows[place]
        if text in row.id or any(text in turn.text.casefold() for turn in row.messages):
            return True
        return any(
            text in lines[place]["text"].casefold()
            for name, lines in self.lines.items()
            if place not in sight.withheld[name]
        )

    def _retrieved(self, name: str, candidate: Candidate) -> dict[str, Retrieved]:
        """Id -> what a candidate retrieved for some row."""
        lines = self.lines[name] if self.lines[name].mention("retrieved") else ()
        ids = {identifier for line in lines for identifier in line.get("retrieved", ())}
        if not ids:
            return {}
        if candidate.documents is not None:
            passages = Documents(self._store, candidate.documents).passages
            return {one.id: Retrieved(one.source, one.title, one.text, one.labels) for one in passages if one.id in ids}
        rows = load_dataset(self._store, str(candidate.dataset)).examples("train")
        return {row.id: Retrieved(row.source, "", _asked(row), owner=_owner(row)) for row in rows if row.id in ids}


def _owner(row: Example) -> tuple[str, str]:
    return row.tenant or "", row.region or ""


def _concerns(owner: tuple[str, str], reader: Scope) -> bool:
    """Whether a row concerns a reader: those of a tenant or a region see its rows, and those that state none."""
    return all(mine in ("", own) or not own for mine, own in zip((reader.tenant, reader.region), owner, strict=True))


def _asked(row: Example) -> str:
    return "\n".join(turn.text for turn in row.request)
