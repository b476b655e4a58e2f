"""Searches for a better prompt and better shots on validation rows, so that prompting is a strong rival."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.asking import ask_rows
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import turns_only
from tunesmith.candidates.retrieval import choose_shots, draw_shots
from tunesmith.candidates.settings import Search
from tunesmith.core.digests import canonical_lines, digest_bytes
from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.data.dataset import Dataset, Example
from tunesmith.records.training import PromptTry, SearchBody
from tunesmith.store.store import Store

# A candidate, validation rows, and its answers' lines in the same order -> one score per row.
Score = Callable[[Candidate, Sequence[Example], Sequence[Fields]], list[float]]
MakeAnswerer = Callable[[Candidate], Answerer]


@dataclass(frozen=True, slots=True)
class Try:
    """One combination: a prompt's text, the number of shots (0: none), and how they are chosen."""

    prompt: str
    count: int
    how: str  # fixed, diverse, or drawn N


def plan_tries(settings: Search, prompts: Sequence[str]) -> list[Try]:
    """At most settings.tries combinations: each prompt with each number of shots, fixed, then diverse, then drawn.

    Where the budget ends within a round, that round is ordered by hashed descriptions, so that the first prompt has no
    advantage.
    """
    planned: list[Try] = []
    pairs = list(product(dict.fromkeys(prompts), dict.fromkeys(settings.shots)))
    with_shots = [pair for pair in pairs if pair[1]]
    rounds = ["fixed", "diverse", *(f"drawn {turn}" for turn in range(settings.tries))] if with_shots else ["fixed"]
    for how in rounds:
        of_round = [Try(prompt, count, how) for prompt, count in (pairs if how == "fixed" else with_shots)]
        left = settings.tries - len(planned)
        if left < len(of_round):
            of_round.sort(key=lambda one: _mixed(settings.seed, f"{one.prompt}\0{one.count}\0{one.how}"))
        planned += of_round[:left]
    return planned


def search_prompts(
    store: Store,
    settings: Search,
    candidate: Candidate,
    prompts: Sequence[str],
    dataset: Dataset,
    answerer: MakeAnswerer,
    score: Score,
    work: Path,
    progress: Progress = SILENT,
) -> str:
    """Try combinations on validation rows and store a search record; returns its digest.

    The best mean score wins; among equals the fewest prompt tokens, then the first planned. The test rows are not read.
    Raises UsageError where there are no validation rows.
    """
    rows = tried_rows(dataset.examples("validation"), settings)
    if not rows:
        raise UsageError(
            "a search needs validation rows, and the dataset has none",
            where=f"candidates.{candidate.name}.search",
            fix="raise data.split.validation",
        )
    train = dataset.examples("train")
    tries: list[PromptTry] = []
    lines: list[JsonObject] = []
    planned = plan_tries(settings, prompts)
    with progress.task(f"{candidate.name}: {len(planned)} tries of {len(rows)} validation rows", len(planned)) as task:
        for number, one in enumerate(planned):
            shots = _shots(train, one, settings.seed)
            tried = with_choice(candidate, one.prompt, shots)
            asked = ask_rows(answerer(tried), rows, work / f"try-{number:03d}", f"try {number + 1}")
            scores = score(tried, rows, asked.lines)
            one_try = PromptTry(
                prompt=one.prompt,
                shots=tuple(shot.id for shot in shots),
                how=one.how if one.count else "none",
                mean=round(math.fsum(scores) / len(scores), 9),
                prompt_tokens=asked.total("prompt_tokens"),
                completion_tokens=asked.total("completion_tokens"),
                seconds=asked.seconds,
            )
            tries.append(one_try)
            lines += [{"try": number, "score": value, **line} for value, line in zip(scores, asked.lines, strict=True)]
            task.note(f"best so far {max(each.mean for each in tries):.1%}")
            task.advance()
    body = SearchBody(
        settings=settings.model_dump(mode="json"),
        split="validation",
        rows=len(rows),
        budget=len(tries) * len(rows),
        seconds=math.fsum(each.seconds for each in tries),
        tries=tuple(tries),
        best=min(range(len(tries)), key=lambda n: (-tries[n].mean, tries[n].prompt_tokens, n)),
    )
    blobs = {"answers.jsonl": store.put_bytes(canonical_lines(lines))}
    parents = {"base": candidate.base, "dataset": dataset.digest, **candidate.documents_parent}
    return store.put_record(body.record(parents, blobs))


def found_choice(store: Store, digest: str, dataset: Dataset) -> tuple[str, list[Example]]:
    """The prompt and the shots of a search's best combination."""
    body = SearchBody.read(store, digest)
    best = body.tries[body.best]
    by_id = {example.id: example for example in dataset.examples("train")}
    return best.prompt, [by_id[name] for name in best.shots]


def with_choice(candidate: Candidate, prompt: str, shots: Sequence[Example]) -> Candidate:
    """A copy of the candidate with this prompt and these shots."""
    shown = tuple(turns_only(shot.messages) for shot in shots)
    return candidate.model_copy(update={"prompt": prompt, "shots": shown})


def _shots(train: Sequence[Example], one: Try, seed: int) -> list[Example]:
    if not one.count:
        return []
    if one.how.startswith("drawn"):
        return draw_shots(train, one.count, seed * 1_000_003 + int(one.how.split()[1]))
    return choose_shots(train, one.count, one.how)


def tried_rows(validation: Sequence[Example], settings: Search) -> list[Example]:
    """The validation rows that a search asks: settings.rows of them, chosen by hash, in the order of their ids."""
    ordered = sorted(validation, key=lambda row: _mixed(settings.seed, row.id))
    return sorted(ordered[: settings.rows], key=lambda row: row.id)


def _mixed(seed: int, text: str) -> str:
    return digest_bytes(f"{seed}\0{text}".encode())
