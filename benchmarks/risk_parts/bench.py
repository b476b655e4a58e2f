"""A base with its engine, adapters trained on it, and a probe's finding about them through the functions in use."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fabricate import put_dataset

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.candidates.composing import Composer, compose
from tunesmith.core.access import ANYONE
from tunesmith.core.digests import canonical
from tunesmith.core.system.files import write_atomic
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.data.settings import Privacy
from tunesmith.engines.native.engine import NativeEngine, NativeModel
from tunesmith.evaluation.gates.judging import Evidence, judge_gate
from tunesmith.evaluation.gates.settings import Probe
from tunesmith.evaluation.lines import ITEMS
from tunesmith.evaluation.metrics.declared import make_scoring
from tunesmith.evaluation.metrics.scorers import SCORERS
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.probes.measuring import by_arm, encode_items, measure
from tunesmith.evaluation.probes.suites import ask, probe_context
from tunesmith.evaluation.scores import Column, column
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.records.evaluation import EvaluationBody, JudgedGate, MeasuredCandidate
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import TrainingRow, training_rows
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import make_spec, record_training, run_training

METRIC = "exact_match"


@dataclass
class Bench:
    """A base with its engine, and trainings on it."""

    folder: Path
    spec: str
    _asked: dict[tuple[str, str | None, int], list[dict[str, Any]]] = field(default_factory=dict)
    _scored: dict[tuple[str, str], Column] = field(default_factory=dict)

    @cached_property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @cached_property
    def base(self) -> Base:
        return resolve_base(self.store, self.spec, self.folder)

    @cached_property
    def model(self) -> NativeModel:
        """The weights that answer, and that every training starts from."""
        return NativeModel(self.base)

    @cached_property
    def engine(self) -> NativeEngine:
        return self.model.engine()

    def dataset(self, learned: Sequence[Example], test: Sequence[Example], validation: Sequence[Example] = ()) -> str:
        """A dataset version of these rows."""
        return put_dataset(self.store, learned, validation, test)

    def tuned(self, dataset: str, prompt: str = "", **settings: Any) -> Candidate:
        """A candidate trained on the dataset's rows, its adapter loaded."""
        chosen = TrainSettings(**{"rank": 16, "batch": 8, "epochs": 1, **settings})
        rows = load_dataset(self.store, dataset)
        untrained = Candidate(name="tuned", base=self.base.digest, prompt=prompt, max_tokens=12)

        def put(examples: Sequence[Example]) -> list[TrainingRow]:
            asked = [(*compose(untrained, each.request), each.messages[-1]) for each in examples]
            return [TrainingRow(each.id, messages) for each, messages in zip(examples, asked, strict=True)]

        spec = make_spec(
            base=self.base,
            dataset=dataset,
            rows=put(training_rows(rows.examples("train"), chosen)),
            validation=put(rows.examples("validation")),
            settings=chosen,
            work=self.folder / "work",
        )
        training = record_training(self.store, spec, run_training(spec, model=self.model))
        shutil.rmtree(self.folder / "work")
        for name, blob in self.store.record(training).blobs.items():
            write_atomic(self.folder / "adapter" / name, self.store.read_blob(blob))
        self.engine.load_adapter(training, self.folder / "adapter")
        return untrained.model_copy(update={"training": training})

    def answers(self, suite: str, dataset: str, candidate: Candidate, gate: Probe, *, before: bool) -> str:
        """An answers record as the chain keeps it."""
        rows = load_dataset(self.store, dataset)
        composer = Composer(self.store, candidate)
        asked_of = probe_context(self.store, rows, candidate, composer, gate.rows, gate.path, Privacy())
        items = suite_of(suite).items(asked_of)
        training = None if before else candidate.training
        blob = self.store.put_bytes(encode_items(items))
        key = blob, training, candidate.max_tokens
        if key not in self._asked:  # what the base says does not depend on whom it is compared with
            renderer = Renderer(self.base.folder)
            self._asked[key] = ask(self.engine, self.engine, renderer, training, items, candidate)
        answered = b"".join(canonical(line) + b"\n" for line in self._asked[key])
        blobs = {"answers.jsonl": self.store.put_bytes(answered), ITEMS: blob}
        parents = {"base": self.base.digest, "dataset": dataset} | ({"training": training} if training else {})
        return self.store.put_record(
            Record(
                kind="answers",
                parents=parents,
                blobs=blobs,
                body={"suite": suite, "revision": suite_of(suite).revision},
            )
        )

    def finding(self, candidate: Candidate, dataset: str, **gate: Any) -> JudgedGate:
        """What a probe's gate finds about a candidate."""
        asked = Probe(**gate)
        suite = asked.suite
        put_candidate(self.store, candidate)
        before = self.answers(suite, dataset, candidate, asked, before=True) if suite_of(suite).before else None
        after = self.answers(suite, dataset, candidate, asked, before=False)
        lines, told = measure(self.store, suite, candidate, after, before, dataset, make_scoring(METRIC, None, Path()))
        key = suite, candidate.name
        stated = MeasuredCandidate.model_construct(tuned=candidate.tuned)
        body = EvaluationBody.model_construct(
            candidates={candidate.name: stated}, risks={suite: {candidate.name: told}}, primary=METRIC, seed=0
        )
        evidence = Evidence(
            body=body,
            candidate=candidate.name,
            kind="model",
            use=1,
            columns={(candidate.name, METRIC): self.scores(candidate, dataset)},
            measured={key: by_arm(lines)} if lines else {},
        )
        return judge_gate(suite, asked, evidence)

    def scores(self, candidate: Candidate, dataset: str) -> Column:
        """Scores of the test rows by the leading metric, which every finding about a candidate needs."""
        key = candidate.model_dump_json(), dataset
        if key not in self._scored:
            self._scored[key] = self._scores(candidate, dataset)
        return self._scored[key]

    def _scores(self, candidate: Candidate, dataset: str) -> Column:
        test = load_dataset(self.store, dataset).examples("test")
        answerer = Answerer(self.store, self.engine, candidate)
        given = self.engine.generate([answerer.generation(each.request, ANYONE) for each in test], candidate.training)
        marks = [SCORERS[METRIC](one.text, each.answer, None) for one, each in zip(given, test, strict=True)]
        return column(candidate.name, METRIC, {e.id: (e.group, m) for e, m in zip(test, marks, strict=True)})
