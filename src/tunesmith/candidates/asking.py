"""Asks a candidate many rows in chunks, so that a stopped run loses one chunk at most, and stores the answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tunesmith.candidates.answering import Answerer
from tunesmith.core.digests import canonical_lines
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.names import bare_label
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.records.evaluation import AnswersBody, TimeEstimate
from tunesmith.store.store import Store

# Rows per chunk: what kill -9 can lose. Several batches, so that batches stay full. A resumed run has the same chunks,
# and therefore gives the same bytes.
TOGETHER = 256


class Request(Protocol):
    """What a candidate is asked: a row of a split, or a request of the policy."""

    @property
    def id(self) -> str:
        """Its name among the requests that are asked with it."""
        ...

    @property
    def request(self) -> Conversation:
        """The turns before the answer."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to rows. lines: one per row (id, text, finish, tokens). expected: estimated seconds.

    seconds: without building a baseline or an index, which serving builds once.
    """

    lines: list[JsonObject]
    seconds: float
    expected: float

    def total(self, count: str) -> int:
        """The sum of the lines' prompt_tokens or completion_tokens."""
        return sum(line[count] for line in self.lines)

    def body(self, suite: str, **more: Any) -> AnswersBody:
        """The body of an answers record, with more of its fields."""
        served = sorted({line["served_by"] for line in self.lines if "served_by" in line})
        return AnswersBody(
            suite=suite,
            n=len(self.lines),
            seconds=self.seconds,
            estimate=TimeEstimate(seconds=self.expected),
            prompt_tokens=self.total("prompt_tokens"),
            completion_tokens=self.total("completion_tokens"),
            served_by=tuple(served),
            **more,
        )


# Conversations -> for each, label -> log-probability.
Likelihoods = Callable[[Sequence[Conversation]], list[dict[str, float]]]


def ask_rows(
    answerer: Answerer,
    examples: Sequence[Request],
    work: Path,
    title: str,
    progress: Progress = SILENT,
    likelihoods: Likelihoods | None = None,
) -> Asked:
    """Answers to the examples' requests, in their order. work: a folder for finished chunks, which a resumed run reads.

    likelihoods: gives each answer a confidence, which is 0 for an answer that is not a label. Its time does not count.
    """
    lines: list[JsonObject] = []
    seconds, expected = 0.0, 0.0
    with progress.task(title, len(examples)) as task:
        for number, start in enumerate(range(0, len(examples), TOGETHER)):
            chunk = examples[start : start + TOGETHER]
            kept = work / f"{number:05d}.json"
            if not kept.is_file():
                answerer.prepare(chunk[0].request, answerer.composer.asked_as)
                began = time.perf_counter()
                try:
                    asked = [_generation(answerer, example) for example in chunk]
                    given = answerer.responder.generate(asked, answerer.candidate.training)
                except UsageError as error:
                    raise _named(error, answerer, chunk) from error
                spent = time.perf_counter() - began
                told = [_line(answerer, *each) for each in zip(chunk, asked, given, strict=True)]
                if likelihoods is not None:
                    for line, sums in zip(told, likelihoods([one.messages for one in asked]), strict=True):
                        line["confidence"] = _confidence(line["text"], sums)
                write_atomic(kept, json.dumps({"seconds": spent, "lines": told}).encode())
            part = parse_json(kept.read_bytes())
            lines += part["lines"]
            seconds += part["seconds"]
            expected = expected or seconds * len(examples) / len(chunk)
            task.advance(len(chunk))
    return Asked(lines, seconds, expected)


def keep_answers(
    store: Store,
    parents: Mapping[str, str],
    lines: Sequence[Fields],
    body: AnswersBody,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Store an answers record with its lines and further files; returns its digest."""
    whole = {"answers.jsonl": canonical_lines(map(dict, lines)), **(files or {})}
    blobs = {name: store.put_bytes(content) for name, content in whole.items()}
    return store.put_record(body.record(parents, blobs))


def _generation(answerer: Answerer, example: Request) -> Generation:
    return answerer.generation(example.request, answerer.composer.asked_as)


def _named(error: UsageError, answerer: Answerer, chunk: Sequence[Request]) -> UsageError:
    """The error with the name of the first request that alone gives one; the error itself where none does."""
    for example in chunk if answerer.candidate.asks_base else ():
        try:
            answerer.responder.generate(
                [replace(_generation(answerer, example), max_tokens=1)], answerer.candidate.training
            )
        except UsageError as own:
            return UsageError(own.what, where=f"request {example.id}, {own.where}", fix=own.fix)
    return error


def _line(answerer: Answerer, example: Request, asked: Generation, completion: Completion) -> JsonObject:
    text = completion.text
    if answerer.renderer is not None and isinstance(example, Example):
        text = answerer.renderer.comparable(asked.messages, example.call, text)
    line: JsonObject = {
        "id": example.id,
        "text": text,
        "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }
    if ids := answerer.composer.retrieved(example.request, answerer.composer.asked_as).ids:
        line["retrieved"] = list(ids)
    if completion.confidence is not None:
        line["confidence"] = completion.confidence
    if completion.served_by:
        line["served_by"] = completion.served_by
    return line


def _confidence(text: str, sums: Mapping[str, float]) -> float:
    """The answer's share of all labels' probability; 0 for an answer that is not a label.

    Labels that differ only in case and spaces are one, as in the label's score.
    """
    given, largest = bare_label(text), max(sums.values())
    shares = {label: math.exp(each - largest) for label, each in sums.items()}
    own = math.fsum(share for label, share in shares.items() if bare_label(label) == given)
    return round(own / math.fsum(shares.values()), 6)
