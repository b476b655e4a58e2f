"""Reads answers records and checks them against the test rows and against candidates' training rows."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, Refused
from tunesmith.core.messages import Conversation
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import Dataset, Example, load_dataset
from tunesmith.data.documents import Documents
from tunesmith.data.duplicates import answer_key, learned_parts, request_text
from tunesmith.evaluation.lines import Lines, answers_to, is_number, read_answer_lines
from tunesmith.evaluation.metrics.declared import Answered
from tunesmith.evaluation.probes.numbers import GeneralQuestion, right_share
from tunesmith.evaluation.scores import GENERAL, Column, column
from tunesmith.store.store import Store

_FEW_WORDS, _SHORT, _NEAR = 3, 16, 300  # words; characters of a request; characters between a request and its answer
# The name, in probes, of the weights before tuning: the project's own base.
BASE = "base"


def of_base(name: str) -> str:
    """The name, in probes, of a candidate's weights before tuning where its base is not the project's own."""
    return f"{BASE} of {name}"


def before_tuning(name: str, measured: Container[str]) -> str:
    """The name of a tuned candidate's weights before tuning, of all that were measured."""
    return of_base(name) if of_base(name) in measured else BASE


class Answers(NamedTuple):
    """One candidate's answers to rows. lines: row id -> line. seconds: the time for all rows.

    seen: row id -> the answer as scorers see it.
    """

    digest: str
    candidate_digest: str
    candidate: Candidate
    lines: Lines
    seconds: float
    seen: Mapping[str, Answered]


def read_answers(store: Store, digest: str, dataset: Dataset, rows: Sequence[Example], split: str = "test") -> Answers:
    """A candidate's answers to the rows of a split, exactly one for each. Raises Inconclusive otherwise."""
    record, body = answers_to(store, digest, split, f"answers {short(digest)}", dataset=dataset.digest)
    candidate = load_candidate(store, record.parents["candidate"])
    where = f"answers of {candidate.name!r}"
    lines = read_answer_lines(store, record, [row.id for row in rows], where)
    for identifier, line in lines.items():
        if not isinstance(line.get("text"), str) or line.get("finish") not in ("stop", "length"):
            raise Inconclusive("an answer has no text or no finish reason", where=f"{where}, {identifier}")
        for key in ("prompt_tokens", "completion_tokens"):
            if not is_number(line.get(key)) or line[key] < 0 or line[key] != int(line[key]):
                raise Inconclusive(f"{key} is {line.get(key)!r}, not a count", where=f"{where}, {identifier}")
    if body.seconds < 0:
        raise Inconclusive(f"seconds is {body.seconds!r}, not a duration", where=where)
    seen = seen_answers(store, dataset, candidate, lines, rows)
    return Answers(digest, record.parents["candidate"], candidate, lines, body.seconds, seen)


def seen_answers(
    store: Store,
    rows: Dataset,
    candidate: Candidate,
    lines: Lines,
    examples: Sequence[Example],
) -> dict[str, Answered]:
    """Row id -> the answer as scorers see it, with the request and the retrieved texts. lines: answers by row id.

    Raises Inconclusive where a retrieved text no longer exists.
    """
    names = {name for line in lines.values() for name in line.get("retrieved", ())}
    texts: dict[str, str] = {}
    if names and candidate.documents is not None:
        texts = {passage.id: passage.text for passage in Documents(store, candidate.documents).passages}
    elif names:
        source = rows if candidate.dataset == rows.digest else load_dataset(store, str(candidate.dataset))
        texts = {
            example.id: "\n".join(turn.content for turn in example.messages)
            for example in source.examples("train")
            if example.id in names
        }
    lost = sorted(names - texts.keys())
    if lost:
        raise Inconclusive(f"{candidate.name!r} retrieved {lost[0]!r}, which is not in its dataset or documents")
    return {
        example.id: Answered(
            text=lines[example.id]["text"],
            reference=example.answer,
            request=example.request,
            retrieved=tuple(texts[name] for name in lines[example.id].get("retrieved", ())),
        )
        for example in examples
    }


def check_held_out(store: Store, rows: Dataset, test: Sequence[Example], name: str, candidate: Candidate) -> None:
    """Raise Refused for a candidate that was trained on a test row or its group, or can read one.

    Texts are compared folded and without system turns, each answer that training learns with the turns before it.
    """
    held_texts = {_folded(example.messages) for example in test}
    held_ids, held_groups = {example.id for example in test}, {example.group for example in test}
    shown = (shot[: n + 1] for shot in candidate.shots for n, turn in enumerate(shot) if turn.role == "assistant")
    if any(_folded(part) in held_texts for part in shown):
        raise Refused(f"{name!r} shows a test row in its prompt", fix="choose shots among the training rows")
    _check_readable(store, test, name, candidate)
    learned = {candidate.dataset} - {None}
    if candidate.training is not None:
        learned.add(store.record(candidate.training, kind="training").parents["dataset"])
    for digest in sorted(str(each) for each in learned):
        source = rows if digest == rows.digest else load_dataset(store, digest)
        for example in source.examples("train"):
            learned_texts = map(_folded, learned_parts(example.messages))
            if example.id in held_ids or example.group in held_groups or not held_texts.isdisjoint(learned_texts):
                raise Refused(
                    f"{name!r} learned from the training row {example.id!r}, which is a test row or shares its group",
                    where=f"dataset {short(digest)}",
                    fix="train and evaluate on one dataset version, whose split holds whole groups out",
                )


def _check_readable(store: Store, test: Sequence[Example], name: str, candidate: Candidate) -> None:
    """Raise Refused where one text that the candidate reads holds a test row's request and, near it, its answer.

    Those are its prompt, each turn of its shots, its schema or grammar, and the passages it retrieves from. Requests of
    one or two short words are in many texts by chance, and are not looked for.
    """
    said = [turn.content for shot in candidate.shots for turn in shot]
    shown = [candidate.prompt, *said, candidate.answer_schema or "", candidate.answer_grammar or ""]
    texts = [
        (fold(text), "prompt", "take the row out of the prompt, the shots or the schema") for text in shown if text
    ]
    if candidate.documents is not None:
        passages = Documents(store, candidate.documents).passages
        texts += [(fold(passage.text), "documents", "remove the document or the row") for passage in passages]
    together = "\0".join(text for text, *_ in texts)
    for example in test:
        asked, answer = fold(example.request[-1].content), fold(example.answer)
        if (len(asked) < _SHORT and len(asked.split()) < _FEW_WORDS) or asked not in together:
            continue
        for text, place, fix in texts:
            if any(answer in around for around in _around(text, asked, _NEAR + len(answer))):
                what = f"what {name!r} reads contains the test row {example.id!r} with its answer"
                raise Refused(what, where=f"candidate {name}, {place}", fix=fix)


def _around(text: str, asked: str, near: int) -> Iterator[str]:
    """What stands before and after each place of a request in a text."""
    place = text.find(asked)
    while place >= 0:
        yield text[max(0, place - near) : place]
        yield text[place + len(asked) : place + len(asked) + near]
        place = text.find(asked, place + 1)


def read_probe(
    store: Store, digest: str, name: str, questions: Mapping[str, GeneralQuestion], base: str, training: str | None
) -> Column:
    """The right choice's probability for each question. base, training: of the weights that were asked. Raises
    Inconclusive for answers of others."""
    where = f"general probe of {name!r}"
    record, _ = answers_to(store, digest, GENERAL, where, base=base, training=training)
    lines = read_answer_lines(store, record, questions, where)
    cells = {each: (each, right_share(lines[each].get("scores"), question)) for each, question in questions.items()}
    return column(name, GENERAL, cells)


def _folded(messages: Conversation) -> tuple[str, str]:
    return request_text(messages), fold(answer_key(messages[-1].text))
