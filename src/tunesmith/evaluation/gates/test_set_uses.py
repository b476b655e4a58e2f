"""The budget of test rows: who looked at them how often, kept in the audit log, where it cannot be taken back unseen.

A look is a candidate's first scoring on these rows where its weights were trained (choosing the best of ten by their
test scores is ten looks, whichever is judged), or its first verdict where they were not. Controls, trained on answers
dealt to the wrong requests, are looked at and not chosen from.

Rows count as the same where any request of theirs is: a dataset version with a row more does not begin a new budget,
one with other test rows does. How a look tightens the bar stands in statistics.confidence_at_look: alpha is spent over
the looks (alpha spending: Lan and DeMets 1983, Biometrika 70; alpha investing over a stream of hypotheses: Foster and
Stine 2008, JRSS B 70). That bounds candidates chosen by their test scores, not ones fitted to the rows themselves: what
adapts to each row it was shown needs fresh rows (Dwork et al. 2015, Science 349; Blum and Hardt 2015, ICML).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import select

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Inconclusive, Refused
from tunesmith.data.dataset import load_dataset
from tunesmith.store import database
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

ACTION = "test.look"
_TEST = "test.jsonl"


def record_evaluation(store: Store, evaluation: str, actor: str) -> None:
    """Write down that trained candidates were scored, where they had not been before. One entry for all of them."""
    record = store.record(evaluation, kind="evaluation")
    stated = record.body["candidates"].values()
    trained = sorted(each["candidate"] for each in stated if each["tuned"] and not _control(store, each["candidate"]))
    _record(store, record.parents["dataset"], evaluation, trained, actor)


def take_look(store: Store, evaluation: str, candidate: str, actor: str) -> int:
    """The how-manieth look at the test rows a verdict on this candidate is, written down where it is a new one.

    A candidate keeps its number: asking again about the same answers is not another look. Candidates first scored in
    one evaluation share the number of the last of them.
    """
    dataset = store.record(evaluation, kind="evaluation").parents["dataset"]
    _record(store, dataset, evaluation, [candidate], actor)
    seen: set[str] = set()
    for names in _looks(store, dataset):
        seen.update(names)
        if candidate in seen:
            return len(seen)
    raise Refused("the audit log does not hold the look that was just taken", fix="run `tunesmith audit verify`")


def looks_taken(store: Store, dataset: str) -> int:
    """How many candidates have been looked at on this dataset's test rows."""
    return len({name for names in _looks(store, dataset) for name in names})


def _record(store: Store, dataset: str, evaluation: str, candidates: Sequence[str], actor: str) -> None:
    known = {name for names in _looks(store, dataset) for name in names}
    new = [candidate for candidate in candidates if candidate not in known]
    if not new:
        return
    rows = _requests(store, dataset)
    detail = {"dataset": dataset, "evaluation": evaluation, "candidates": new, "rows": len(rows)}
    with store.change(actor, ACTION, store.record(dataset, kind="dataset").blobs[_TEST], detail):
        pass  # the entry is the change


def _looks(store: Store, dataset: str) -> Iterator[list[str]]:
    """Candidates by look, oldest first: verdicts from before looks were written down, then the log's entries."""
    earlier = [
        store.record(child, kind="verdict")
        for _, kind, evaluation in store.children(dataset)
        if kind == "evaluation"
        for _, child_kind, child in store.children(evaluation)
        if child_kind == "verdict"
    ]
    for verdict in sorted((each for each in earlier if "rules" not in each.body), key=_look_of):
        yield [verdict.parents["candidate"]]
    with database.reading(store.engine) as session:
        query = select(AuditRow.subject, AuditRow.detail).where(AuditRow.action == ACTION).order_by(AuditRow.seq)
        entries: list[tuple[str, Any]] = [(subject, detail) for subject, detail in session.execute(query)]
    own = store.record(dataset, kind="dataset").blobs.get(_TEST)
    shares: dict[str, bool] = {str(own): True}
    for subject, detail in entries:
        if subject not in shares:
            shares[subject] = bool(_requests(store, dataset) & _texts(store.read_blob(subject).splitlines()))
        if shares[subject]:
            yield list(detail["candidates"])


def _look_of(verdict: Record) -> int:
    return int(verdict.body["look"])


def _requests(store: Store, dataset: str) -> frozenset[str]:
    if _TEST not in load_dataset(store, dataset).record.blobs:
        raise Inconclusive("the dataset has no test rows", where=dataset)
    return _texts(store.read_blob(store.record(dataset).blobs[_TEST]).splitlines())


def _texts(lines: Iterable[bytes]) -> frozenset[str]:
    """A digest for each request, whatever its row is called and answered with."""
    found = set()
    for line in lines:
        turns = json.loads(line)["messages"][:-1]
        found.add(digest_of([[turn["role"], " ".join(turn["content"].split())] for turn in turns]))
    return frozenset(found)


def _control(store: Store, candidate: str) -> bool:
    training = store.record(candidate, kind="candidate").parents.get("training")
    if training is None:
        return False
    return bool(store.record(training, kind="training").body.get("settings", {}).get("permute_answers"))
