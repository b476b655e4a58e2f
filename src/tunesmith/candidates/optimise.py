"""Searches on validation rows for a candidate's best shots, retrieval and prompt, so that tuning has a strong rival.

Optuna chooses shots and retrieval; GEPA (rewriting.py) has the prompt rewritten. Each answer is kept under what was
asked, and each step follows from the answers before it: a search that was killed repeats its steps and asks for the
rest only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.asking import ask_rows
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import turns_only
from tunesmith.candidates.retrieval import choose_shots, draw_shots
from tunesmith.candidates.settings import Optimise, Shots, TokenPrice
from tunesmith.core.digests import canonical_lines, digest_bytes, digest_of
from tunesmith.core.errors import UsageError
from tunesmith.core.progress import Task
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.data.dataset import Dataset, Example
from tunesmith.records.training import PromptTry, SearchBody
from tunesmith.store.store import Store
from tunesmith.training.settings import LEAST_SCORED

# A candidate, validation rows, and its answers' lines in the same order -> one score per row.
Score = Callable[[Candidate, Sequence[Example], Sequence[Fields]], list[float]]

_TOGETHER = 16  # rows after which it is decided whether a try goes on
_KEPT_SHARE = 3  # about one try in so many goes on there, and at three times, nine times as many rows
_REPEATED = 50  # after so many tries that were made before, all has been tried
_SHOTS = (0, 2, 4, 8, 16)
_RETRIEVED = (1, 2, 4, 8, 16, 32)


class Spent(Exception):
    """The stated calls or the stated cost, which it names, are used up."""


@dataclass
class Tried:
    """A candidate that was tried. shots: ids of training rows; how: they were chosen. lines: row id -> its answer's
    line, with the score. why: it could not answer."""

    candidate: Candidate
    shots: tuple[str, ...]
    how: str
    lines: dict[str, JsonObject] = field(default_factory=dict)
    seconds: float = 0.0
    why: str | None = None

    @property
    def mean(self) -> float:
        """The mean of the scores so far; 0 where there is none."""
        return math.fsum(line["score"] for line in self.lines.values()) / max(1, len(self.lines))

    def total(self, tokens: str) -> int:
        """The sum of the lines' prompt_tokens or completion_tokens."""
        return sum(line[tokens] for line in self.lines.values())


@dataclass
class Asker:
    """Asks tried candidates for answers to validation rows and scores them, within the stated calls and cost.

    price: of the candidate's endpoint. limit: of the calls, for now. work: a folder, in which each answer is kept.
    tried: by the candidate's digest.
    """

    settings: Optimise
    price: TokenPrice | None
    answerer: Callable[[Candidate], Answerer]
    score: Score
    work: Path
    task: Task
    limit: int
    calls: int = 0
    cost: float = 0.0
    tried: dict[str, Tried] = field(default_factory=dict)
    _dearest: dict[str, float] = field(default_factory=dict)  # the highest cost of one call, by who was asked
    _ready: tuple[str, Answerer] | None = None  # the last one, with its index of examples

    def answers(
        self, rows: Sequence[Example], candidate: Candidate, shots: tuple[str, ...], how: str
    ) -> list[JsonObject]:
        """The lines of a candidate's answers to rows, each with its score. Raises Spent; raises UsageError where it
        cannot answer, as where its prompt is too long."""
        name = digest_of(candidate.model_dump(mode="json", by_alias=True))
        one = self.tried.setdefault(name, Tried(candidate, shots, how))
        missing = [row for row in rows if row.id not in one.lines]
        if missing:
            if one.why is not None:
                raise UsageError(one.why)
            self.spend("candidate", len(missing))
            if self._ready is None or self._ready[0] != name:
                self._ready = name, self.answerer(candidate)
            folder = self.work / digest_of([name, *(row.id for row in missing)]).removeprefix("sha256:")
            try:
                asked = ask_rows(self._ready[1], missing, folder, how)
            except UsageError as error:
                one.why = error.what
                raise
            self.paid("candidate", self.price, asked.lines)
            for line, score in zip(asked.lines, self.score(candidate, missing, asked.lines), strict=True):
                one.lines[line["id"]] = {"score": score, **line}
            one.seconds += asked.seconds
            self.task.note(f"best so far {max(each.mean for each in self.tried.values()):.1%}")
        return [one.lines[row.id] for row in rows]

    def spend(self, who: str, calls: int) -> None:
        """Count calls that are made next. Raises Spent where they would pass a bound, if each costs what the dearest
        did."""
        if self.calls + calls > self.limit:
            raise Spent("calls")
        if self.settings.cost is not None and self.cost + calls * self._dearest.get(who, 0.0) > self.settings.cost:
            raise Spent("cost")
        self.calls += calls
        self.task.advance(calls)

    def paid(self, who: str, price: TokenPrice | None, answers: Sequence[Fields]) -> None:
        """Count what answers cost."""
        if price is not None:
            each = [price.of(line["prompt_tokens"], line["completion_tokens"]) for line in answers]
            self.cost += math.fsum(each)
            self._dearest[who] = max(self._dearest.get(who, 0.0), *each)

    def best(self, rows: int) -> int:
        """The place of the best try of so many rows: the best mean, then the fewest prompt tokens, then the first. That
        of the settings as they are written where none was asked all rows."""
        tried = list(self.tried.values())
        whole = [place for place, one in enumerate(tried) if len(one.lines) == rows]
        return min(whole, key=lambda place: (-tried[place].mean, tried[place].total("prompt_tokens"), place), default=0)


def tried_rows(validation: Sequence[Example], settings: Optimise, where: str) -> list[Example]:
    """The validation rows that a search asks: settings.rows of them, ordered by hash. Raises UsageError for too few."""
    if len(validation) < LEAST_SCORED:  # the best of many tries would be the luckiest one
        raise UsageError(
            f"a search takes {LEAST_SCORED} validation rows, and the dataset has {len(validation)}",
            where=where,
            fix="raise data.split.validation",
        )
    return sorted(validation, key=lambda row: digest_bytes(f"{settings.seed}\0{row.id}".encode()))[: settings.rows]


def choose(
    asker: Asker,
    candidate: Candidate,
    written: Shots | None,
    prompts: Sequence[str],
    train: Sequence[Example],
    rows: Sequence[Example],
    embedder: str | None,
) -> None:
    """Try shots, prompts, and for a candidate that retrieves also k and by, as Optuna draws them. What is written comes
    first. Most tries are given up before they have answered all rows. embedder: of a candidate that retrieves.

    Ends where nothing new is drawn. Raises Spent, and UsageError where the candidate as it is written cannot answer.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first: dict[str, Any] = {
        "prompt": 0,
        "shots": written.count if written else 0,
        "how": written.choose if written else "fixed",
    }
    options: dict[str, set[Any]] = {
        "prompt": set(range(len(prompts))),
        "shots": {each for each in _SHOTS if each <= len(train)},
        "how": {"fixed", "diverse", "drawn"},
    }
    if candidate.retrieve is not None:
        first |= {"k": candidate.retrieve.k, "by": candidate.retrieve.by}
        options |= {"k": {*_RETRIEVED}, "by": {"bm25", "dense", "fused"}}
    space: dict[str, BaseDistribution] = {
        key: CategoricalDistribution(sorted({*some, first[key]})) for key, some in options.items()
    }
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_KEPT_SHARE)
    study = optuna.create_study(pruner=pruner, direction="maximize")
    study.enqueue_trial(first)
    repeated = 0
    for number in count():
        study.sampler = optuna.samplers.TPESampler(seed=asker.settings.seed + number)
        trial = study.ask(space)
        made, shots, how = _drawn(candidate, trial.params, prompts, train, embedder, asker.settings.seed, number)
        spent, scores, state = asker.calls, list[float](), optuna.trial.TrialState.COMPLETE
        try:
            for step, start in enumerate(range(0, len(rows), _TOGETHER), 1):
                some = rows[start : start + _TOGETHER]
                scores += [line["score"] for line in asker.answers(some, made, shots, how)]
                trial.report(math.fsum(scores) / len(scores), step)
                if trial.should_prune() and len(scores) < len(rows):
                    state = optuna.trial.TrialState.PRUNED
                    break
        except UsageError:
            if number == 0:
                raise
            state = optuna.trial.TrialState.PRUNED  # of one that failed, the sampler would learn nothing
        value = math.fsum(scores) / len(scores) if state == optuna.trial.TrialState.COMPLETE else None
        study.tell(trial, value, state)
        repeated = 0 if asker.calls > spent else repeated + 1
        if repeated == _REPEATED:
            return


def _drawn(
    candidate: Candidate,
    params: Mapping[str, Any],
    prompts: Sequence[str],
    train: Sequence[Example],
    embedder: str | None,
    seed: int,
    number: int,
) -> tuple[Candidate, tuple[str, ...], str]:
    """The candidate with what Optuna drew, the ids of its shots, and how they were chosen."""
    how, wanted = params["how"], params["shots"]
    if how == "drawn":
        how, shots = f"drawn {number}", draw_shots(train, wanted, seed * 1_000_003 + number)
    else:
        shots = choose_shots(train, wanted, how)
    made = with_choice(candidate, prompts[params["prompt"]], shots)
    if candidate.retrieve is not None:
        retrieve = candidate.retrieve.model_copy(update={"k": params["k"], "by": params["by"]})
        made = made.model_copy(update={"retrieve": retrieve, "embedder": embedder if retrieve.by != "bm25" else None})
    return made, tuple(shot.id for shot in shots), how if shots else "none"


def searched(asker: Asker, rows: int, ended: str) -> SearchBody:
    """What a search of so many rows found. ended: what was used up."""
    tried = list(asker.tried.values())
    return SearchBody(
        settings=asker.settings.model_dump(mode="json", exclude={"rewriter"}),
        split="validation",
        rows=rows,
        budget=asker.calls,
        seconds=math.fsum(one.seconds for one in tried),
        tries=tuple(
            PromptTry(
                prompt=one.candidate.prompt,
                shots=one.shots,
                how=one.how,
                retrieve=one.candidate.retrieve,
                rows=len(one.lines),
                why=one.why,
                mean=round(one.mean, 9),
                prompt_tokens=one.total("prompt_tokens"),
                completion_tokens=one.total("completion_tokens"),
                seconds=one.seconds,
            )
            for one in tried
        ),
        best=asker.best(rows),
        cost=round(asker.cost, 9),
        ended=ended,
    )


def keep_search(store: Store, body: SearchBody, asker: Asker, candidate: Candidate, dataset: Dataset) -> str:
    """Store the record of a search with all answers; returns its digest."""
    lines = [{"try": place, **line} for place, one in enumerate(asker.tried.values()) for line in one.lines.values()]
    blobs = {"answers.jsonl": store.put_bytes(canonical_lines(lines))}
    parents = {"base": candidate.base, "dataset": dataset.digest, **candidate.documents_parent}
    return store.put_record(body.record(parents, blobs))


def described(body: SearchBody) -> str:
    """What a search found, in words."""
    first, best = body.tries[0], body.tries[body.best]
    retrieved = f", {best.retrieve.k} retrieved by {best.retrieve.by}" if best.retrieve else ""
    prompt = "" if best.prompt == first.prompt else ", another prompt"
    cost = f", which cost {body.cost:g}" if body.cost else ""
    return (
        f"best of {len(body.tries)} tries: {best.mean:.1%} of {best.rows} validation rows, {first.mean:.1%} of "
        f"{first.rows} as it is written. {len(best.shots)} shots ({best.how}){retrieved}{prompt}. {body.budget} "
        f"answers{cost}; used up: {body.ended}"
    )


def with_choice(candidate: Candidate, prompt: str, shots: Sequence[Example]) -> Candidate:
    """A copy of the candidate with this prompt and these shots."""
    shown = tuple(turns_only(shot.messages) for shot in shots)
    return candidate.model_copy(update={"prompt": prompt, "shots": shown})
