"""An evaluation with hostile texts, of candidates that can and cannot be asked, in the store of a scene."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.fabricate import (
    SCHEMA,
    Scene,
    adapter_files,
    answer_lines,
    commands,
    example,
    flawed,
    put_answers,
    put_base,
    put_dataset,
    put_training,
)
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.access import Labels
from tunesmith.core.digests import canonical
from tunesmith.data.dataset import Example
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.records.candidate import RemoteModel, Retrieve
from tunesmith.store.records import Record
from tunesmith.store.store import Store

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title = 1">',
    "\u202eleft\u202c is right",
    "{{ 7 * 7 }} [click](javascript:alert(1))",
    "long " * 2000,
)
SECRET = "the safe is behind the picture"  # of a document that only acme's support may see


@dataclass(frozen=True)
class Evaluated:
    """Digests of the evaluation and of its verdict on `tuned`, and its held-out rows by id."""

    evaluation: str
    verdict: str
    rows: list[Example]

    @property
    def path(self) -> str:
        """Where the console shows it."""
        return f"/console/evidence/{self.evaluation[7:]}"


def put_evaluation(scene: Scene, n: int = 60) -> Evaluated:
    """n held-out rows: the first five hostile, five of the tenant acme; six candidates."""
    store = scene.store
    test = [
        example(text, {"intent": "HassTurn", "slots": {}}, f"hostile-{number}", labels={"kind": text[:30]})
        for number, text in enumerate(HOSTILE)
    ]
    test += [
        example(f"open door {number} of acme", {"intent": "HassTurn", "slots": {}}, "acme", None, tenant="acme")
        for number in range(5)
    ]
    test += [row.model_copy(update={"labels": {"kind": "command"}}) for row in commands(n - len(test), 3, 2000)]
    test.sort(key=lambda row: row.id)
    dataset = put_dataset(store, commands(20, 1, 0), commands(5, 2, 1000), test)
    documents = _put_documents(store)
    base = {"base": scene.base, "max_tokens": 24}
    training = put_training(store, scene.base, dataset, adapter_files(scene.base, 77))
    other = put_base(store, 9)
    remote = RemoteModel(url="https://models.example/v1", model="large")
    retrieve: dict[str, Any] = {"retrieve": Retrieve(**{"from": "documents"})}
    candidates = [
        (Candidate(name="prompt", prompt="Answer in JSON.", **base), flawed(0.2, 0.5, 1)),
        (Candidate(name="rag", prompt="Answer.", documents=documents, **retrieve, **base), _told(flawed(0.5, 0.9, 2))),
        (Candidate(name="tuned", prompt="Answer in JSON.", training=training, dataset=dataset, **base), _hostile()),
        (Candidate(name="nearest", method="nearest", dataset=dataset, **base), flawed(0.3, 1.0, 4)),
        (Candidate(name="remote", endpoint=remote, **base), flawed(0.6, 1.0, 5)),
        (Candidate(name="elsewhere", base=other, max_tokens=24), flawed(0.1, 1.0, 6)),
    ]
    parents = {"dataset": dataset}
    for candidate, answer in candidates:
        lines = answer_lines(test, answer)
        if candidate.documents:
            lines = [{**line, "retrieved": ["public", "secret"][: 1 + n % 2]} for n, line in enumerate(lines)]
        lines[0]["finish"] = "length"
        parents[f"answers:{candidate.name}"] = put_answers(store, put_candidate(store, candidate), dataset, lines)
    task = TaskSettings.model_validate({"scorers": ["exact_match", "json_valid"]})
    found = evaluate(store, parents, task=task, answer_schema=SCHEMA)
    gates = GATES.validate_python({"valid": {"metric": "json_valid", "at_least": 0.5}})
    return Evaluated(found, judge(store, evaluation=found, candidate="tuned", gates=gates), test)


def _put_documents(store: Store) -> str:
    support = Labels(tenant="acme", groups=("support",))
    passages = [
        Passage(id="public", source="docs/<b>lamps</b>.md", title="Lamps", text=HOSTILE[0], labels=Labels()),
        Passage(id="secret", source="docs/safe.md", title="Safe", text=SECRET, labels=support),
    ]
    data = b"".join(canonical(one.model_dump(mode="json")) + b"\n" for one in passages)
    settings: dict[str, Any] = {"paths": ["docs/*.md"], "asked_as": {"tenant": "acme", "groups": ["support"]}}
    return store.put_record(
        Record(kind="documents", blobs={PASSAGES: store.put_bytes(data)}, body={"settings": settings})
    )


def _told(answer: Callable[[Example], str]) -> Callable[[Example], str]:
    """Answers that repeat the document that not everybody may see."""
    return lambda row: f"{answer(row)} {SECRET}"


def _hostile() -> Callable[[Example], str]:
    """Right answers, but for hostile ones to hostile requests, and wrong ones to every tenth row."""
    plain = flawed(0.9, 1.0, 3)

    def answer(row: Example) -> str:
        text = row.messages[-2].content
        if text in HOSTILE:
            return json.dumps({"intent": "HassTurn", "slots": {"said": text}})
        return plain(row)

    return answer
