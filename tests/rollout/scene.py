"""A store with a small chain of real records: a base, a dataset, an untuned and tuned candidates, signed versions.

Shared by the tests of rollout, server and monitoring. Users: ann (admin, engineer) registers, bob approves, olga
operates, stu is the steward.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.registry.fabric import put_verdict
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, encode_examples, encode_removed, example_id
from tunesmith.registry.approvals import approve
from tunesmith.registry.versions import Version, register
from tunesmith.store.identities import add_user, ensure_owner
from tunesmith.store.records import Record
from tunesmith.store.store import Store

OWNER, APPROVER, OPERATOR, STEWARD = "ann", "bob", "olga", "stu"
NAME = "home"
FINGERPRINT = "sha256:" + "f" * 64


@dataclass
class Scene:
    """A store, and the digests of what all versions in it came of."""

    store: Store
    base: str
    dataset: str
    untuned: str

    def candidate(self, seed: int | None, name: str = "tuned") -> str:
        """An untuned candidate (None), or one tuned to weights of their own."""
        training = None if seed is None else self._training(seed)
        facts = {"prompt": f"Answer as {name}.", "max_tokens": 32}
        return put_candidate(
            self.store, Candidate(name=name, base=self.base, dataset=self.dataset, training=training, **facts)
        )

    def version(self, seed: int | None, *, approved: bool = True, name: str = NAME, **scope: str) -> Version:
        """A registered version of a candidate, approved by bob."""
        candidate = self.candidate(seed)
        answered = {"candidate": candidate, "dataset": self.dataset}
        answers = self.store.put_record(Record(kind="answers", parents=answered, body={"suite": "test", "n": 30}))
        facts = {"candidate": candidate, "tuned": seed is not None, "dataset": self.dataset, "answers": answers}
        _, verdict = put_verdict(self.store, name="tuned", **facts)
        version = register(self.store, name=name, verdict=verdict, actor=OWNER, **scope)
        if approved:
            approve(self.store, version, approver=APPROVER, reason="looks right")
        return version

    def _training(self, seed: int) -> str:
        config = {
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": 2,
            "target_modules": ["q_proj"],
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
        rng = np.random.default_rng(seed)
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{layer}.lora_A.weight": rng.standard_normal((2, 8), dtype=np.float32),
            f"{layer}.lora_B.weight": rng.standard_normal((8, 2), dtype=np.float32),
        }
        metadata = {"tunesmith": json.dumps({"base": self.base, "fingerprint": FINGERPRINT})}
        blobs = {
            "adapter_config.json": self.store.put_bytes(json.dumps(config).encode()),
            "adapter_model.safetensors": self.store.put_bytes(save(tensors, metadata)),
        }
        parents = {"base": self.base, "dataset": self.dataset}
        return self.store.put_record(
            Record(kind="training", parents=parents, blobs=blobs, body={"fingerprint": FINGERPRINT, "seed": seed})
        )


def example(number: int, *, answer: str = '{"intent": "on"}', **fields: Any) -> Example:
    """A row of the dataset."""
    messages = (
        Message(role="user", content=f"switch on lamp {number} in room {number % 7}"),
        Message(role="assistant", content=answer),
    )
    given = {"source": "rows.jsonl", "licence": "Apache-2.0", "group": f"g{number}", **fields}
    return Example(id=example_id(messages, given["source"]), messages=messages, **given)


def put_dataset(store: Store, splits: dict[str, list[Example]]) -> str:
    """A dataset record of these splits."""
    blobs = {f"{name}.jsonl": store.put_bytes(encode_examples(rows)) for name, rows in splits.items()}
    blobs["removed.jsonl"] = store.put_bytes(encode_removed([]))
    return store.put_record(
        Record(kind="dataset", blobs=blobs, body={"splits": {name: len(rows) for name, rows in splits.items()}})
    )


def build_scene(root: Path, base: str | None = None) -> Scene:
    """An empty installation but for its users, a base (a record's digest, else one made up) and 40 + 5 + 15 rows."""
    store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
    ensure_owner(store)
    for name, roles in ((APPROVER, ["approver"]), (OPERATOR, ["operator"]), (STEWARD, ["steward"])):
        add_user(store, name, roles, actor=OWNER)
    facts = {"spec": "tiny", "family": "llama", "context_length": 64, "fingerprint": FINGERPRINT, "files": {}}
    base = base or store.put_record(Record(kind="base", body=facts))
    rows = [example(number, subject=f"person-{number % 5}") for number in range(60)]
    dataset = put_dataset(store, {"train": rows[:40], "validation": rows[40:45], "test": rows[45:]})
    scene = Scene(store=store, base=base, dataset=dataset, untuned="")
    scene.untuned = scene.candidate(None, "zero-shot")
    return scene
