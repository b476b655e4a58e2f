"""A fabricated chain of records, small enough to sign in milliseconds: what a real project leaves in its store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.settings import GATES
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.store.records import Record
from tunesmith.store.store import Store

FINGERPRINT = digest_bytes(b"rendering")
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj")
RANK, WIDTH = 4, 8


@dataclass(frozen=True)
class Chain:
    """Digests of the records up to the verdict."""

    base: str
    dataset: str
    training: str | None
    candidate: str
    evaluation: str
    verdict: str


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
    """A in [rank, width], B in [width, rank] for each layer, float32."""
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


def put_base(store: Store, seed: int = 0) -> str:
    """A base record; its files lie elsewhere."""
    files = {"config.json": {"digest": digest_bytes(b"{}"), "bytes": 2}}
    body = {
        "spec": f"base-{seed}",
        "family": "llama",
        "context_length": 256,
        "fingerprint": FINGERPRINT,
        "files": files,
    }
    return store.put_record(Record(kind="base", body=body))


def put_dataset(store: Store, seed: int = 0) -> str:
    """A dataset of three splits."""
    splits = {"train": 6, "validation": 2, "test": 4}
    blobs = {"removed.jsonl": store.put_bytes(canonical({"id": "x", "reason": "duplicate", "seed": seed}) + b"\n")}
    for split, count in splits.items():
        rows = [canonical({"id": f"{split}-{seed}-{i}", "messages": []}) + b"\n" for i in range(count)]
        blobs[f"{split}.jsonl"] = store.put_bytes(b"".join(rows))
    return store.put_record(Record(kind="dataset", blobs=blobs, body={"splits": splits}))


def put_training(store: Store, base: str, dataset: str, files: Mapping[str, bytes], fingerprint: str) -> str:
    """A training with the adapter's files."""
    blobs = {name: store.put_bytes(data) for name, data in files.items()}
    body = {"steps": 10, "final_loss": 0.5, "fingerprint": fingerprint}
    return store.put_record(Record(kind="training", parents={"base": base, "dataset": dataset}, blobs=blobs, body=body))


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
    stated = {
        "candidate": candidate,
        "tuned": tuned,
        "metrics": {"json_valid": {"mean": value, "low": value, "high": value}},
    }
    evaluation = store.put_record(
        Record(
            kind="evaluation",
            parents={"dataset": dataset, **({f"answers:{name}": answers} if answers else {})},
            blobs={"scores.jsonl": store.put_bytes(b"".join(scores))},
            body={
                "n": rows,
                "primary": "json_valid",
                "metrics": ["json_valid"],
                "seed": 0,
                "candidates": {name: stated},
                "risks": {},
            },
        )
    )
    # No untuned rival was measured, so a lift over one is inconclusive.
    lift = {"metric": "json_valid", "over": "best-untuned", "at_least": 0.05}
    gate = lift if outcome == "inconclusive" else {"metric": "json_valid", "at_least": 0.9}
    judged = judge(store, evaluation=evaluation, candidate=name, gates=GATES.validate_python({"valid": gate}))
    assert store.record(judged).body["verdict"] == outcome
    return evaluation, judged


def fabricate(
    store: Store,
    *,
    verdict: str = "pass",
    tuned: bool = True,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    weights: bytes | None = None,
    fingerprint: str = FINGERPRINT,
) -> Chain:
    """Put a whole chain into the store. config, weights: in place of the adapter's own files."""
    base, dataset = put_base(store), put_dataset(store, seed)
    training = None
    if tuned:
        files = {
            CONFIG_FILE: json.dumps(config if config is not None else adapter_config(base)).encode(),
            ADAPTER_FILE: weights if weights is not None else encode(adapter_tensors(seed), base),
        }
        training = put_training(store, base, dataset, files, fingerprint)
    name = "tuned" if tuned else "few-shot"
    candidate = put_candidate(
        store, Candidate(name=name, base=base, prompt="Answer.", max_tokens=16, dataset=dataset, training=training)
    )
    lines = b"".join(canonical({"id": f"test-{seed}-{i}", "text": "{}"}) + b"\n" for i in range(4))
    answers = store.put_record(
        Record(
            kind="answers",
            parents={"candidate": candidate, "dataset": dataset},
            blobs={"answers.jsonl": store.put_bytes(lines)},
            body={"suite": "test", "n": 4},
        )
    )
    evaluation, judged = put_verdict(
        store, name=name, candidate=candidate, tuned=tuned, dataset=dataset, outcome=verdict, answers=answers
    )
    return Chain(base, dataset, training, candidate, evaluation, judged)
