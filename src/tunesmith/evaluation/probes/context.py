"""What probes make their items from: the rows that a candidate was trained on, and the held-out rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer, compose
from tunesmith.core.access import ANYONE
from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Dataset, Example
from tunesmith.data.settings import Privacy
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import Canary, canaries, training_rows
from tunesmith.training.settings import recorded_settings

Put = Callable[[Example, Sequence[Message]], tuple[Message, ...]]
Asked = Callable[[Sequence[Message]], tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class ProbeContext:
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
    privacy: Privacy = Privacy()  # noqa: RUF009 - frozen
    last_alone: bool = False

    def answers(self, rows: Sequence[Example]) -> list[Example]:
        """A row for each answer that training learns, or would learn, of these rows: the conversation up to it."""
        found = []
        for row in rows:
            learned = [place for place, turn in enumerate(row.messages) if turn.role == "assistant" and turn.weight]
            for place in learned[-1:] if self.last_alone else learned:
                turns = row.messages[: place + 1]
                cut = {} if turns == row.messages else {"id": f"{row.id}/{place}", "messages": turns}
                found.append(row.model_copy(update=cut))
        return found


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

    def put(row: Example, request: Sequence[Message]) -> tuple[Message, ...]:
        changed = row.model_copy(update={"messages": (*request, row.messages[-1])})
        return compose(candidate, request, composer.retrieved_without_group(changed, ANYONE))

    if candidate.training is not None:
        stated = TrainingBody.read(store, candidate.training).settings.model_dump()
        settings = recorded_settings(stated)
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


def drawn(rows: Sequence[Example], many: int) -> list[Example]:
    """At most `many` random rows, always the same ones."""
    ordered = sorted(rows, key=lambda row: row.id)
    return ordered if len(ordered) <= many else random.Random(0).sample(ordered, many)


def with_last_request(messages: Sequence[Message], change: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with their last user turn changed."""
    place = max(place for place, turn in enumerate(messages) if turn.role == "user")
    turn = messages[place]
    return (*messages[:place], turn.model_copy(update={"content": change(turn.content)}), *messages[place + 1 :])
