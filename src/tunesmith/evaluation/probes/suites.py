"""What each probe has: its items, the number that an answer becomes, and the judge of all its numbers together.

Items are made from the rows that a candidate was trained on, and from the held-out rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer, compose
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import Fields
from tunesmith.core.text.wording import percent, points
from tunesmith.data.dataset import Dataset, Example
from tunesmith.data.settings import Privacy
from tunesmith.engines.protocol import Engine, Generation, Question, Responder
from tunesmith.evaluation.lines import is_number
from tunesmith.evaluation.metrics.declared import Answered, Scoring, checked
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.probes.measuring import Arm, Item, Measured, left_out
from tunesmith.evaluation.scores import Column, rounded
from tunesmith.evaluation.stats.statistics import SHARES, Floats, Interval, Level, interval
from tunesmith.models.rendering import Renderer
from tunesmith.records.evaluation import RiskResults
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import Canary, canaries, training_rows
from tunesmith.training.settings import TrainSettings

Put = Callable[[Example, Conversation], Turns]
Asked = Callable[[Conversation], Turns]


class ProbeContext(NamedTuple):
    """What a probe knows about a candidate.

    trained: its training rows, without canaries. put: (row, request) -> the conversation as training composes it, with
    retrieval from other groups only. asked: request -> the conversation as serving composes it. rows: the most items of
    each kind. path: the data set or text that the probe reads. last_alone: whether training learned the last answer of
    a conversation alone.
    """

    trained: Sequence[Example]
    canaries: Sequence[Canary]
    validation: Sequence[Example]
    test: Sequence[Example]
    put: Put
    asked: Asked
    rows: int
    path: Path | None = None
    privacy: Privacy = Privacy()
    last_alone: bool = False

    @property
    def needed_path(self) -> Path:
        """The path of a probe whose gate must name one."""
        assert self.path is not None
        return self.path

    def answers(self, rows: Sequence[Example]) -> list[Example]:
        """A row for each answer that training learns, or would learn, of these rows: the conversation up to it."""
        answers = []
        for row in rows:
            learned = [place for place, turn in enumerate(row.messages) if turn.role == "assistant" and turn.weight]
            for place in learned[-1:] if self.last_alone else learned:
                turns = row.messages[: place + 1]
                cut = {} if turns == row.messages else {"id": f"{row.id}/{place}", "messages": turns}
                answers.append(row.model_copy(update=cut))
        return answers


def probe_context(
    store: Store,
    dataset: Dataset,
    candidate: Candidate,
    composer: Composer,
    rows: int,
    path: Path | None,
    privacy: Privacy,
) -> ProbeContext:
    """The probe context of a candidate, with the rows and canaries that its training used."""
    trained: Sequence[Example] = ()
    planted: Sequence[Canary] = ()
    last_alone = False

    def put(row: Example, request: Conversation) -> Turns:
        changed = row.model_copy(update={"messages": (*request, row.messages[-1])})
        return compose(candidate, request, composer.retrieved_without_group(changed))

    if candidate.training is not None:
        stated = TrainingBody.read(store, candidate.training).settings.model_dump()
        known = stated.keys() & TrainSettings.model_fields.keys()  # earlier records have settings that are gone
        settings = TrainSettings.model_validate({key: stated[key] for key in known})
        trained = training_rows(dataset.examples("train"), settings.model_copy(update={"canaries": None}))
        planted = canaries(trained, settings.canaries) if settings.canaries else ()
        last_alone = settings.loss_on == "last"
    return ProbeContext(
        trained=trained,
        canaries=planted,
        validation=dataset.examples("validation"),
        test=dataset.examples("test"),
        put=put,
        asked=lambda request: composer.conversation(request, composer.asked_as),
        rows=rows,
        path=path,
        privacy=privacy,
        last_alone=last_alone,
    )


def digest_path(path: Path) -> str:
    """The digest of a file, or of a folder's files by name. Raises UsageError where there is neither."""
    try:
        if path.is_dir():
            return digest_of({file.name: digest_file(file) for file in sorted(path.iterdir()) if file.is_file()})
        return digest_file(path)
    except OSError as error:
        raise UsageError(
            f"the probe's file cannot be read: {error.strerror}", where=str(path), fix="correct the gate's path"
        ) from error


def question(name: str, arm: str, request: str, choices: tuple[str, ...], group: str = "") -> Item:
    """An item that is one request of a user. group: by default its own."""
    asked = (Message(role="user", content=request),)
    return Item(id=name, group=group or name, arm=arm, messages=asked, choices=choices)


def sampled(items: list[Any], many: int) -> list[Any]:
    """At most `many` random items of a list, always the same ones."""
    return items if len(items) <= many else random.Random(0).sample(items, many)


def drawn(rows: Sequence[Example], many: int) -> list[Example]:
    """At most `many` random rows, whatever their order, always the same ones."""
    return sampled(sorted(rows, key=attrgetter("id")), many)


def with_last_request(messages: Conversation, change: Callable[[str], str]) -> Turns:
    """The messages with their last user turn changed."""
    place = max(place for place, turn in enumerate(messages) if turn.role == "user")
    turn = messages[place]
    return (*messages[:place], turn.model_copy(update={"content": change(turn.content)}), *messages[place + 1 :])


# An item, its answer's line and the primary metric's scoring function -> a number.
Value = Callable[[Item, Fields, Scoring], float]


class Case(NamedTuple):
    """The input of a judge. test: the candidate's test scores by the primary metric. told: the record's account.

    repeats: the gate's setting.
    """

    measured: Measured
    test: Column
    level: Level
    told: RiskResults = RiskResults()
    repeats: int | None = None

    def arm(self, name: str) -> Arm:
        """The measurements of one arm. Raises Inconclusive where there are none."""
        if name not in self.measured:
            raise Inconclusive(f"there are no measurements of the kind {name!r}")
        return self.measured[name]

    def mean(self, values: Floats, groups: Sequence[str], ends: tuple[float, float] | None = SHARES) -> Interval:
        """The interval of a mean, resampled over groups. ends: as `interval` takes them."""
        return interval(values, groups, ends, self.level)


class Shown(NamedTuple):
    """The number that the gate compares with its bound, the sentence about it, and further keys of the record."""

    interval: Interval
    sentence: str
    extra: Mapping[str, Any] = {}


class Chart(NamedTuple):
    """How the report shows each arm of a probe, before and after tuning.

    title: of an arm's name. ends: of the scale; neutral: the value that favours nobody. said: a value in words.
    sides: the values before and after, and their groups. raised, lowered: what a change of either sign is.
    """

    title: Callable[[str], str]
    ends: tuple[float, float]
    said: Callable[[float], str]
    neutral: float = 0.0
    sides: Callable[[str, Arm], tuple[Floats, Floats, Sequence[str]]] = lambda _, arm: (arm.base, arm.after, arm.groups)
    raised: str = "tuning raised it"
    lowered: str = "tuning lowered it"


class Suite(NamedTuple):
    """How one probe is measured, judged and shown.

    items: makes what is asked. value: turns an answer into a number. judge: the number and sentence of all of them.
    before: whether the base's weights are asked too. own: whether the items come from the candidate's rows, with its
    prompt. untuned: whether the probe also applies to candidates that were not trained. none: the reason to give where
    there are no items. left_out: the rows of which it leaves out answers that are calls of functions. revision: raise
    it when the items or the number change. chart: None for a probe of which the report shows the gate only.
    """

    items: Callable[[ProbeContext], list[Item]]
    value: Value
    judge: Callable[[Case], Shown]
    before: bool = False
    own: bool = True
    untuned: bool = False
    none: str = "there are none"
    left_out: Callable[[ProbeContext], Sequence[Example]] = lambda _: ()
    revision: int = 1
    chart: Chart | None = None

    def count_left_out(self, context: ProbeContext) -> int | None:
        """How many answers the probe leaves out; None for none."""
        return sum(bool(row.messages[-1].tool_calls) for row in self.left_out(context)) or None

    def show(self, case: Case) -> Shown:
        """The number and sentence of the probe. Raises Inconclusive where the measurements are not enough."""
        if not case.measured:
            raise Inconclusive("nothing was measured: no item of this probe fits the rows")
        shown = self.judge(case)
        return shown._replace(sentence=shown.sentence + left_out(case.told.left_out))


def ask(
    responder: Responder,
    engine: Engine | None,
    renderer: Renderer,
    adapter: str | None,
    items: Sequence[Item],
    candidate: Candidate,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """A line for each item: {"id", "scores", "tokens"} by the engine, or {"id", "text"} by the candidate's responder.

    engine: None for a candidate that the base does not answer; no probe measures probabilities of such a candidate.
    """
    likely = [item for item in items if item.choices]
    written = [item for item in items if not item.choices]
    lines: list[dict[str, Any]] = []
    if likely:
        assert engine is not None
        questions = [Question(item.messages, item.choices) for item in likely]
        distinct = list(dict.fromkeys(questions))  # two items may differ in what is made of the scores alone
        scores = dict(zip(distinct, engine.choose(distinct, adapter, progress), strict=True))
        for item, question in zip(likely, questions, strict=True):
            whole = (*item.messages, Message(role="assistant", content=item.choices[0]))
            tokens = renderer.count_row(whole) - renderer.count_prompt(item.messages)
            lines.append({"id": item.id, "scores": scores[question], "tokens": tokens})
    held = Constraint(candidate)
    requests = [
        held.hold(Generation(item.messages, candidate.max_tokens), item.messages[-item.turns :]) for item in written
    ]
    for item, each in zip(written, responder.generate(requests, adapter, progress), strict=True):
        lines.append({"id": item.id, "text": renderer.comparable(item.messages, item.call, each.text)})
    return lines


def likelihoods(item: Item, line: Fields) -> list[float]:
    """The log-probability of each choice."""
    return numbers.log_probabilities(line.get("scores"), len(item.choices), item.id)


def share(item: Item, line: Fields, _scoring: Scoring) -> float:
    """The first choice's share of all choices' probability."""
    return numbers.shares(likelihoods(item, line))[0]


def loss(item: Item, line: Fields, _scoring: Scoring) -> float:
    """The first choice's loss per token."""
    tokens = line.get("tokens")
    if not is_number(tokens) or tokens < 1:
        raise Inconclusive(f"tokens is {tokens!r}, not a count", where=item.id)
    return -likelihoods(item, line)[0] / float(tokens)


def text_of(item: Item, line: Fields) -> str:
    """The answer's text."""
    if not isinstance(line.get("text"), str):
        raise Inconclusive("an answer has no text", where=item.id)
    return str(line["text"])


def scored(item: Item, line: Fields, scoring: Scoring) -> float:
    """The answer's score by the primary metric."""
    value = scoring(Answered(text_of(item, line), item.expected or "", item.messages))
    return checked(value, "the leading metric", item.id)


def worst_change(
    case: Case, *, rise: bool, ends: tuple[float, float] | None = None
) -> tuple[str, Interval, dict[str, Any]]:
    """The arm that tuning changed most: its name, the change with its interval, and further keys of the record.

    rise: whether a rise is bad, else a fall. ends: as `numbers.worst` takes them.
    """
    arms = {
        name: (arm.after - arm.base if rise else arm.base - arm.after, arm.groups)
        for name, arm in case.measured.items()
    }
    name, shown = numbers.worst(arms, ends, case.level)
    before = {each: rounded(arm.base.mean()) for each, arm in case.measured.items()}
    after = {each: rounded(arm.after.mean()) for each, arm in case.measured.items()}
    return name, shown, {"kind": name, "before": before, "after": after}


def between(shown: Interval, written: Callable[[float], str]) -> str:
    """A number with its interval."""
    return f"{written(shown.mean)} ({written(shown.low)} to {written(shown.high)})"


def in_points(shown: Interval) -> str:
    """A difference of shares with its interval, in points."""
    return between(shown, points)


def in_percent(shown: Interval) -> str:
    """A share with its interval, in percent."""
    return between(shown, percent)
