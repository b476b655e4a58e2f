"""How many candidates have used a test set: counted in the audit log, where an entry cannot be removed unnoticed.

A trained candidate uses the test rows at its first scoring: choosing the best of ten candidates by their test scores
is ten uses, whichever of them is judged. An untrained candidate uses them at its first verdict. Control candidates,
which are trained on shuffled answers, do not count, since nobody chooses among them. A candidate that is evaluated
again under another name, as a registered version is, does not count again.

Uses count within the scope that the dataset was built for: what another tenant chose among says nothing here, and its
rows are not shown by a count.

Two dataset versions share a test set where one in a hundred test requests of the smaller one, and at least two, are in
both, folded and without system turns. A version with one more training row or another system prompt therefore does not
start a new count; a version with other test rows does, even if a greeting is in both. `confidence_at_use` in
stats/statistics.py says how each use widens the intervals: alpha is spent over the uses (alpha spending: Lan and DeMets
1983, Biometrika 70; alpha investing: Foster and Stine 2008, JRSS B 70). This bounds the error from choosing candidates
by test scores. It does not cover candidates that were fitted to single test rows; those need fresh rows (Dwork et al.
2015, Science 349; Blum and Hardt 2015, ICML).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import select

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Inconclusive, NextStep, Refused
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

ACTION = "test.use"
_TEST = "test.jsonl"


def record_evaluation(store: Store, evaluation: str, actor: str) -> None:
    """Add one audit entry for the trained candidates of an evaluation that had not used these test rows before."""
    record = store.record(evaluation, kind="evaluation")
    stated = EvaluationBody.of(record).candidates.values()
    trained = sorted(each.candidate for each in stated if each.tuned and not _control(store, each.candidate))
    _record(store, record.parents["dataset"], evaluation, trained, actor)


def use_test_set(store: Store, evaluation: str, candidate: str, actor: str) -> int:
    """How many candidates have used the test rows, up to this one; the audit log records a new use.

    A candidate keeps its number: judging the same answers again is no new use. Candidates that were first scored in
    one evaluation share the number of the last of them.
    """
    dataset = store.record(evaluation, kind="evaluation").parents["dataset"]
    _record(store, dataset, evaluation, [candidate], actor)
    seen: set[str] = set()
    own = _nameless(store, candidate)
    for used in _uses(store, dataset):
        seen.update(used)
        if own in seen:
            return len(seen)
    raise Refused("the audit log lacks the use of the test set just recorded", fix=NextStep("check it", "audit verify"))


def used_candidates(store: Store, dataset: str) -> set[str]:
    """The candidates that have used this dataset's test rows, each as `nameless` gives it."""
    return {each for used in _uses(store, dataset) for each in used}


def nameless(candidate: Candidate) -> str:
    """Digest of all that a candidate states but its name."""
    return digest_of(candidate.model_dump(mode="json", by_alias=True, exclude={"name"}))


def _record(store: Store, dataset: str, evaluation: str, candidates: Sequence[str], actor: str) -> None:
    known = used_candidates(store, dataset)
    new = [candidate for candidate in candidates if _nameless(store, candidate) not in known]
    if not new:
        return
    rows = _requests(store, dataset)
    scope = load_dataset(store, dataset).scope.stated()
    detail = {"dataset": dataset, "evaluation": evaluation, "candidates": new, "rows": len(rows), **scope}
    with store.change(actor, ACTION, store.record(dataset, kind="dataset").blobs[_TEST], detail):
        pass  # the entry is the change


def _uses(store: Store, dataset: str) -> Iterator[list[str]]:
    """The candidates of each audit entry on these test rows, without their names, oldest first."""
    with store.reading() as session:
        query = select(AuditRow.subject, AuditRow.detail).where(AuditRow.action == ACTION).order_by(AuditRow.seq)
        uses = [(str(subject), detail) for subject, detail in session.execute(query)]
    scope = load_dataset(store, dataset).scope.stated().get("scope")
    entries = [(subject, detail) for subject, detail in uses if detail.get("scope") == scope]
    shared = {store.record(dataset, kind="dataset").blobs.get(_TEST, ""): True}
    own: frozenset[str] | None = None
    for subject, detail in entries:
        if subject not in shared:
            own = _requests(store, dataset) if own is None else own
            shared[subject] = _share(own, _texts(store, subject))
        if shared[subject]:
            yield [_nameless(store, candidate) for candidate in detail["candidates"]]


def _share(one: Collection[object], other: Collection[object]) -> bool:
    """Whether two test sets have so many requests in common that they count as one."""
    smaller = min(len(one), len(other))
    return len(set(one) & set(other)) >= max(1, min(smaller, max(2, smaller / 100)))


def _nameless(store: Store, candidate: str) -> str:
    """As `nameless`, of a candidate's record; the record's digest where it is gone."""
    try:
        return nameless(load_candidate(store, candidate))
    except Refused:
        return candidate


def _requests(store: Store, dataset: str) -> frozenset[str]:
    blobs = load_dataset(store, dataset).record.blobs
    if _TEST not in blobs:
        raise Inconclusive("the dataset has no test rows", where=dataset)
    return _texts(store, blobs[_TEST])


def _texts(store: Store, blob: str) -> frozenset[str]:
    """Each request's normalised text, without system turns; the row's id and answer do not count."""
    return frozenset(Example.model_validate_json(line).wording for line in store.read_blob(blob).splitlines())


def _control(store: Store, candidate: str) -> bool:
    training = store.record(candidate, kind="candidate").parents.get("training")
    return training is not None and TrainingBody.read(store, training).settings.permute_answers
