"""The stages in order: what is stale, what is skipped, where to resume. The only place that knows them all.

A stage's key is the digest of everything its result depends on: its settings, its parents' digests and its revision.
The record a key gave is kept in the store, so a stage whose inputs did not change is not run again, and one that was
stopped half way carries on in a work folder named by its key.
"""

from __future__ import annotations

import difflib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.answering import Answerer, compose
from tunesmith.candidates.asking import TOGETHER, Likelihoods, ask_rows, keep_answers
from tunesmith.candidates.candidate import Candidate, RemoteModel, load_candidate, put_candidate
from tunesmith.candidates.search import found_choice, search_prompts, with_choice
from tunesmith.candidates.settings import CandidateSettings, Search
from tunesmith.candidates.shots import choose_shots
from tunesmith.core.digests import digest_of, short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.files import lock, write_atomic
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.build import build_dataset, dataset_document
from tunesmith.data.dataset import Dataset, Example, load_dataset
from tunesmith.data.decontaminate import outside_sources
from tunesmith.data.documents import build_documents, document_files
from tunesmith.data.shards import Engine as ShardEngine
from tunesmith.data.shards import Local
from tunesmith.data.signoff import require_signed
from tunesmith.data.sources import find_files
from tunesmith.data.withdrawn import load_withdrawn
from tunesmith.evaluation.declared import Answered, JudgeScorer, Scoring, function_digests, make_scoring, metric_of
from tunesmith.evaluation.evaluate import Costs, evaluation_document
from tunesmith.evaluation.evaluate import evaluate as score_answers
from tunesmith.evaluation.general import general_digest, general_questions
from tunesmith.evaluation.judging import judge_answers
from tunesmith.evaluation.looks import looks_taken, record_evaluation
from tunesmith.evaluation.planning import Assumed, measured_on_validation, plan_document, plan_sentence
from tunesmith.evaluation.probes.ground import digest_path, ground_of
from tunesmith.evaluation.probes.items import ITEMS, encode_items
from tunesmith.evaluation.probes.measuring import Risk
from tunesmith.evaluation.probes.suites import Suite, ask, suite_of
from tunesmith.evaluation.settings import Forgetting, Probe, TaskSettings
from tunesmith.evaluation.verdict import judge, verdict_document
from tunesmith.inference.engine import Question
from tunesmith.inference.opening import engine_kind, open_engine
from tunesmith.inference.settings import EMBEDDED
from tunesmith.project import Project
from tunesmith.registry.versions import Version
from tunesmith.registry.versions import register as register_version
from tunesmith.store import database
from tunesmith.store.identities import require
from tunesmith.store.recalls import recalled
from tunesmith.training.rows import training_rows

if TYPE_CHECKING:
    from tunesmith.inference.engine import Engine
    from tunesmith.models.base import BaseModel
    from tunesmith.training.settings import TrainSettings

# Bump a stage's number when what it computes from the same inputs changes.
_REVISIONS = {
    "data": 3,
    "documents": 1,
    "train": 1,
    "search": 1,
    "answer": 1,
    "judge": 1,
    "probe": 1,
    "risk": 1,
    "evaluate": 1,
    "gate": 2,
}
# What a person must be allowed to do for a stage to be run.
_ACTIONS = {
    "data": "data.build",
    "documents": "data.build",
    "search": "evaluation.run",
    "train": "training.run",
    "answer": "evaluation.run",
    "judge": "evaluation.run",
    "probe": "evaluation.run",
    "risk": "evaluation.run",
    "evaluate": "evaluation.run",
    "gate": "evaluation.run",
}
_MOST_LABELS = 64
_GENERAL = "general"
_BASE = "base"


@dataclass
class Stage:
    """How one stage went. seconds: 0 where it was skipped."""

    name: str
    seconds: float
    skipped: bool


@dataclass
class Chain:
    """One walk along the chain for a project. Stages are asked for by what they give; each looks for it first."""

    project: Project
    progress: Progress = SILENT
    actor: str | None = None  # whose work it is; the project's own way to find out where None
    stages: list[Stage] = field(default_factory=list)
    shards: ShardEngine = field(default_factory=Local)  # who reads the source files' shards; the dataset is the same
    _foretold: bool = False

    @cached_property
    def base(self) -> BaseModel:
        """The base model, found and pinned."""
        from tunesmith.models.base import resolve_base

        began = time.perf_counter()
        found = resolve_base(self.project.store, self.project.settings.base, self.project.root, self.progress)
        self.stages.append(Stage("base", time.perf_counter() - began, skipped=False))
        return found

    @cached_property
    def engine(self) -> Engine:
        """The engine that answers, opened on first need."""
        return open_engine(self.base, self.project.settings.engine)

    @property
    def _engine_kind(self) -> dict[str, str]:
        """Part of what answers depend on. The embedded engine, the first there was, is not named."""
        kind = engine_kind(self.project.settings.engine)
        return {} if kind == EMBEDDED else {"engine": kind}

    def _engine_of(self, candidate: str) -> dict[str, str]:
        """The same for one candidate, by digest: what floors and endpoints answer depends on no engine."""
        return self._engine_kind if load_candidate(self.project.store, candidate).asks_base else {}

    @cached_property
    def dataset(self) -> Dataset:
        """The sealed dataset version of the project's sources."""
        project = self.project
        data = project.settings.data
        sources = [
            *find_files(data.sources, project.root),
            *find_files(outside_sources(data.decontaminate), project.root),
        ]
        schema = project.schema
        withdrawn = load_withdrawn(project.store)
        inputs = {
            "withdrawn": withdrawn.as_json(),
            "settings": data.model_dump(mode="json", exclude={"sign_off"}),
            "files": {file.name: file.digest() for file in sources},
            "schema": schema,
            "rendering": self.base.fingerprint,
            "room": self._row_tokens,
        }

        def build(work: Path) -> str:
            from tunesmith.models.rendering import RowCounter

            return build_dataset(
                project.store,
                project.settings.data,
                project.root,
                count_tokens=RowCounter(self.base.folder),
                max_tokens=self._row_tokens,
                answer_schema=schema,
                special_tokens=self.engine.special_tokens,
                withdrawn=withdrawn,
                work=work,
                engine=self.shards,
                progress=self.progress,
            )

        return load_dataset(project.store, self._stage("data", "data", inputs, build))

    def candidate(self, name: str, restart: bool = False) -> str:
        """Digest of a candidate of the project file; trains its adapter where it has one that is not there yet."""
        settings = self.settings_of(name)
        candidate = self._untrained(name, settings)
        if settings.train is not None:
            training = self._train(name, candidate, settings.train, restart)
            candidate = candidate.model_copy(update={"training": training})
        elif settings.weights is not None:
            candidate = candidate.model_copy(update={"training": self.training(settings.weights)})
        return put_candidate(self.project.store, candidate)

    @cached_property
    def documents(self) -> str:
        """Digest of the project's documents, read and cut into passages. Raises UsageError where it names none."""
        project, settings = self.project, self.project.settings.documents
        if settings is None:
            raise UsageError("no documents are named to look things up in", where="documents", fix="add documents:")
        privacy, tokens = project.settings.data.privacy, self.engine.special_tokens
        inputs = {
            "settings": settings.model_dump(mode="json"),
            "files": {file.name: file.digest() for file in document_files(settings, project.root)},
            "privacy": privacy.model_dump(mode="json"),
            "tokens": list(tokens),
        }

        def build(_work: Path) -> str:
            return build_documents(project.store, settings, project.root, privacy, tokens)

        return self._stage("documents", "documents", inputs, build)

    def answerer(self, candidate: Candidate) -> Answerer:
        """A candidate of the project ready to answer: its weights loaded, its endpoint known."""
        settings = self.project.settings.candidates.get(candidate.name)
        engine = self.engine if candidate.asks_base else None
        self.load_adapter(candidate.training)
        return Answerer(self.project.store, engine, candidate, settings.endpoint if settings else None)

    def training(self, name: str, restart: bool = False) -> str:
        """Digest of a candidate's training. Raises UsageError for a candidate that has none."""
        training = load_candidate(self.project.store, self.candidate(name, restart)).training
        if training is None:
            tuned = [each for each, settings in self.project.settings.candidates.items() if settings.train]
            raise UsageError(
                f"candidate {name!r} has no training",
                where=f"candidates.{name}",
                fix=f"name one of {', '.join(tuned)}" if tuned else "give it `train:`",
            )
        return training

    def answers(self, name: str, split: str = "test") -> str:
        """Digest of a candidate's answers to the test rows, or to those of another split."""
        digest, dataset = self.candidate(name), self.dataset
        inputs = {"candidate": digest, "dataset": dataset.digest, "together": TOGETHER, **self._engine_of(digest)}
        inputs |= {"choices": list(self._choices)} if self._choices else {}
        endpoint = self.settings_of(name).endpoint
        inputs |= {"logprobs": True} if endpoint is not None and endpoint.logprobs else {}
        other = {} if split == "test" else {"split": split}

        def answer(work: Path) -> str:
            if split == "test":
                self._foretell()
            return self._ask(name, digest, split, work)

        return self._stage(" ".join(["answer", name, *other.values()]), "answer", {**inputs, **other}, answer)

    def plan(
        self, lift: float | None = None, differing: float | None = None, between: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What the test rows will be able to show. between: candidates; how they differ is measured on validation."""
        settings, store = self.project.settings, self.project.store
        assumed = Assumed() if differing is None else Assumed(differing)
        if between:
            answers = [self.answers(name, "validation") for name in between]
            assumed = measured_on_validation(store, answers, self.dataset, self._leading_scoring())
        looks = looks_taken(store, self.dataset.digest)
        return plan_document(self.dataset, settings.gates, looks=looks, assumed=assumed, lift=lift)

    def _leading_scoring(self) -> Scoring:
        """What the leading metric scores an answer by. Raises UsageError where a judge is asked for it."""
        task = self.project.settings.task
        leading = next(scorer for scorer in task.scorers if metric_of(scorer) == task.leading)
        return make_scoring(leading, self.project.schema, self.project.root)

    def _foretell(self) -> None:
        """Say what the gates will be able to see, once and before the first answers to test rows cost time."""
        if not self._foretold:
            self._foretold = True
            document = self.plan()
            for gate in document["gates"]:
                self.progress.say(plan_sentence(document, gate))

    def probe(self, name: str | None) -> str:
        """Digest of the general suite's scores under a candidate's weights, or the base's for None."""
        training = None if name is None else self.training(name)
        inputs = {"base": self.base.digest, "training": training, "suite": general_digest(), **self._engine_kind}

        def measure(_work: Path) -> str:
            adapter = self.load_adapter(training)
            questions = general_questions()
            began = time.perf_counter()
            asked = [Question(question.messages, question.choices) for question in questions]
            scores = self.engine.choose(asked, adapter, self.progress)
            seconds = time.perf_counter() - began
            lines = [{"id": question.id, "scores": each} for question, each in zip(questions, scores, strict=True)]
            parents = {"base": self.base.digest} | ({"training": training} if training else {})
            stated = {"suite": _GENERAL, "n": len(lines), "seconds": seconds, **self._engine_kind}
            return keep_answers(self.project.store, parents, lines, stated)

        return self._stage(f"probe {name or _BASE}", "probe", inputs, measure)

    def evaluation(self, names: Sequence[str] | None = None) -> str:
        """Digest of the evaluation of the named candidates, all of the project's where none are named."""
        settings = self.project.settings
        chosen = self._in_order(names)
        answers = {name: self.answers(name) for name in chosen}
        probes: dict[str, str] = {}
        if any(isinstance(gate, Forgetting) for gate in settings.gates.values()):
            tuned = [name for name in chosen if settings.candidates[name].adapted]
            probes = {_BASE: self.probe(None), **{name: self.probe(name) for name in tuned}} if tuned else {}
        risks = self.risks(chosen)
        asked = {"risks": {suite: {name: asdict(each) for name, each in of.items()} for suite, of in risks.items()}}
        schema = self.project.schema
        judged = {
            (name, judge.name): self.judged(name, answers[name], judge)
            for judge in settings.task.judges
            for name in chosen
        }
        endpoints = {name: each.endpoint for name, each in settings.candidates.items() if each.endpoint}
        tokens = {name: each.price for name, each in endpoints.items() if each.price and name in chosen}
        functions = function_digests(settings.task.scorers, self.project.root)
        later = {
            "judged": {f"{metric}:{name}": digest for (name, metric), digest in judged.items()},
            "prices": settings.prices.model_dump(mode="json") if settings.prices else {},
            "tokens": {name: price.model_dump(mode="json") for name, price in tokens.items()},
            "functions": functions,
        }
        inputs = {
            "answers": answers,
            "probes": probes,
            **(asked if risks else {}),  # a project without risk probes keeps the evaluations it has
            "task": _task_inputs(settings.task),
            "schema": schema,
            "dataset": self.dataset.digest,
            **{key: value for key, value in later.items() if value},
        }

        def score(_work: Path) -> str:
            return score_answers(
                self.project.store,
                dataset=self.dataset.digest,
                answers=answers,
                probes=probes,
                task=settings.task,
                answer_schema=schema,
                risks=risks,
                root=self.project.root,
                judged=judged,
                costs=Costs(settings.prices, tokens),
            )

        evaluation = self._stage("evaluate", "evaluate", inputs, score)
        record_evaluation(self.project.store, evaluation, self.project.actor(self.actor))
        return evaluation

    def risks(self, names: Sequence[str]) -> dict[str, dict[str, Risk]]:
        """Answers to the risk probes that gates ask for: suite -> candidate's name -> digests."""
        settings = self.project.settings
        found: dict[str, dict[str, Risk]] = {}
        for gate in settings.gates.values():
            if isinstance(gate, Probe) and gate.suite not in found:
                suite = suite_of(gate.suite)
                for name in names:
                    if self._has_risk(settings.candidates[name], suite):
                        before = self.risk(gate, name, before=True) if suite.before else None
                        found.setdefault(gate.suite, {})[name] = Risk(self.risk(gate, name), before)
        return found

    def _has_risk(self, settings: CandidateSettings, suite: Suite) -> bool:
        """Whether a suite says something of a candidate. An endpoint cannot be released, so no more is sent to it."""
        weights = self.project.settings.candidates[settings.weights] if settings.weights else settings
        if settings.endpoint is not None:
            return False
        return suite.untuned if weights.train is None else not weights.train.permute_answers

    def risk(self, gate: Probe, name: str, *, before: bool = False) -> str:
        """Digest of a candidate's answers to a probe's items; before: under the base's weights."""
        store, suite, dataset = self.project.store, suite_of(gate.suite), self.dataset
        digest = self.candidate(name)
        candidate = load_candidate(store, digest)
        path = None if gate.path is None else self.project.root / gate.path
        parents = {"base": self.base.digest} | ({"dataset": dataset.digest} if suite.own else {})
        training = None if before else candidate.training
        engine = self._engine_of(digest)
        inputs = {
            "suite": gate.suite,
            "parents": parents,
            "training": training,
            "candidate": digest if suite.own else None,
            "file": None if path is None else digest_path(path),
            **engine,
        }

        def measure(_work: Path) -> str:
            answerer = self.answerer(candidate)
            ground = ground_of(store, dataset, candidate, answerer, gate.rows, path, self.project.settings.data.privacy)
            items = suite.items(ground)
            began = time.perf_counter()
            scorer = self.engine if candidate.asks_base else None
            lines = ask(answerer.responder, scorer, training, items, candidate, self.progress)
            body = {"suite": gate.suite, **engine, "n": len(items), "seconds": time.perf_counter() - began}
            made = parents | ({"training": training} if training else {})
            return keep_answers(store, made, lines, body, {ITEMS: encode_items(items)})

        when = "before" if before else "after"
        return self._stage(f"risk {gate.probe} {name} {when}", "risk", inputs, measure)

    def judged(self, name: str, answers: str, scorer: JudgeScorer) -> str:
        """Digest of what a judge said of a candidate's answers."""
        dataset = self.dataset
        question = {"model": scorer.judge.model, "url": scorer.judge.url, "question": scorer.question}
        inputs = {"answers": answers, "metric": scorer.name, **question}

        def ask_judge(work: Path) -> str:
            self.progress.say(f"{scorer.name}: held-out rows and answers are sent to {scorer.judge.url}")
            test = dataset.examples("test")
            return judge_answers(self.project.store, scorer, answers, dataset.digest, test, work, self.progress)

        return self._stage(f"{scorer.name} judges {name}", "judge", inputs, ask_judge)

    def verdict(self, name: str | None = None) -> str:
        """Digest of the verdict on a candidate, by default the one that the project would release."""
        evaluation = self.evaluation()
        subject = name or self.subject(evaluation)
        self.settings_of(subject)
        gates = self.project.settings.gates
        inputs = {
            "evaluation": evaluation,
            "candidate": subject,
            "gates": {key: gate.model_dump(mode="json") for key, gate in gates.items()},
        }

        def decide(_work: Path) -> str:
            actor = self.project.actor(self.actor)
            return judge(self.project.store, evaluation=evaluation, candidate=subject, gates=gates, actor=actor)

        return self._stage(f"gate {subject}", "gate", inputs, decide)

    def subject(self, evaluation: str) -> str:
        """The candidate the project would release: `release:`, else the only tuned one, else the best by the metric."""
        settings = self.project.settings
        if settings.release is not None:
            return settings.release
        tuned = tuned_names(self.project)
        if len(tuned) == 1:
            return tuned[0]
        body = self.project.store.record(evaluation, kind="evaluation").body
        # What an endpoint answers can be measured, not released.
        own = [name for name, each in settings.candidates.items() if each.endpoint is None]
        if not own:
            raise UsageError("only endpoints are measured, and none can be released", where="candidates")
        means = {name: body["candidates"][name]["metrics"][body["primary"]]["mean"] for name in own}
        return max(means, key=lambda name: (means[name], name))

    def settings_of(self, name: str) -> CandidateSettings:
        """What the project file says of a candidate. Raises UsageError for a name it does not know."""
        known = self.project.settings.candidates
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"there is no candidate {name!r}{hint}", where="candidates", fix=f"name one of {', '.join(known)}"
            )
        return known[name]

    # How stages are run

    def _stage(
        self, name: str, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], str], *, again: bool = False
    ) -> str:
        """The record a stage gave for these inputs before, else, or again, make(work folder) gives it now."""
        store = self.project.store
        key = digest_of({"stage": kind, "revision": _REVISIONS[kind], **inputs})
        known = None if again else store.recall_memo(key)
        if known is not None:
            self._refuse_recalled(name, known)
            self._tell(name, 0.0, skipped=True)
            return known
        work = store.root / "work" / f"{kind}-{key.removeprefix('sha256:')[:24]}"
        with lock(store.root / "work" / f"{work.name}.lock", f"stage {name}"):
            known = None if again else store.recall_memo(key)  # another process may have finished it meanwhile
            if known is not None:
                return known
            require(store, self.project.actor(self.actor), _ACTIONS[kind])
            work.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            digest = make(work)
            self._refuse_recalled(name, digest)
            store.keep_memo(key, digest)
            shutil.rmtree(work, ignore_errors=True)
        self._tell(name, time.perf_counter() - began, skipped=False)
        return digest

    def _refuse_recalled(self, name: str, digest: str) -> None:
        with database.reading(self.project.store.engine) as session:
            reason = recalled(session, digest)
        if reason is not None:
            raise Refused(
                f"what this stage gives was recalled: {reason}",
                where=f"stage {name}, record {short(digest)}",
                fix="take what was withdrawn out of the sources (or settings), then run again",
            )

    def _tell(self, name: str, seconds: float, *, skipped: bool) -> None:
        if any(stage.name == name for stage in self.stages):
            return
        self.stages.append(Stage(name, seconds, skipped))
        self.progress.say(f"{name}: unchanged, skipped" if skipped else f"{name}: {seconds:.1f} s")

    def _in_order(self, names: Sequence[str] | None) -> list[str]:
        """Candidates without training first: their figures are there while the others train."""
        known = self.project.settings.candidates
        for name in names or ():
            self.settings_of(name)
        return sorted(names or known, key=lambda name: known[name].adapted)

    @property
    def _row_tokens(self) -> int:
        """Most tokens of a row: the shortest max_length of any training, within the base's context."""
        trained = [each.train.max_length for each in self.project.settings.candidates.values() if each.train]
        return min([self.base.context_length, *trained])

    # Candidates and training

    def _untrained(self, name: str, settings: CandidateSettings) -> Candidate:
        base, most, method = self.base.digest, settings.max_tokens, settings.method
        if settings.prompt is None:  # a floor
            dataset = self.dataset.digest
            return Candidate(name=name, base=base, prompt="", max_tokens=most, method=method, dataset=dataset)
        schema = self.project.schema if settings.constrain else None
        if settings.constrain and schema is None:
            raise UsageError(
                "there is no schema to hold answers to", where=f"candidates.{name}.constrain", fix="set task.schema"
            )
        retrieve, shots, endpoint = settings.retrieve, settings.wanted_shots, settings.endpoint
        from_documents = retrieve is not None and retrieve.from_ == "documents"
        # Tuned ones name it too: the drift watch compares requests with what they were trained on.
        named = shots or settings.adapted or settings.search or (retrieve is not None and not from_documents)
        candidate = Candidate(
            name=name,
            base=base,
            max_tokens=most,
            prompt=self._prompt(name, settings.prompt),
            retrieve=retrieve,
            answer_schema=None if schema is None else json.dumps(schema, ensure_ascii=False),
            dataset=self.dataset.digest if named else None,
            documents=self.documents if from_documents else None,
            embedder=self._embedder if retrieve is not None and retrieve.by != "bm25" else None,
            endpoint=None if endpoint is None else RemoteModel(url=endpoint.url, model=endpoint.model),
        )
        if settings.search is not None:
            return self._searched(candidate, settings.search)
        chosen = choose_shots(self.dataset.examples("train"), shots.count, shots.choose) if shots else []
        return with_choice(candidate, candidate.prompt, chosen)

    def _prompt(self, name: str, file: str) -> str:
        path = self.project.root / file
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the prompt cannot be read: {error}", where=f"candidates.{name}.prompt", fix=f"write {path}"
            ) from error

    @cached_property
    def _embedder(self) -> str:
        from tunesmith.models.embedding import find_embedder

        return find_embedder(self.progress).digest

    def _searched(self, candidate: Candidate, settings: Search) -> Candidate:
        """The candidate with the prompt and the shots that a search on validation rows found best."""
        prompts = [candidate.prompt, *(self._prompt(candidate.name, file) for file in settings.prompts)]
        task, schema = self.project.settings.task, self.project.schema
        inputs = {
            "candidate": candidate.model_dump(mode="json", by_alias=True, exclude={"name"}),
            "prompts": prompts,
            "settings": settings.model_dump(mode="json"),
            "metric": task.leading,
            "schema": schema,
            **(self._engine_kind if candidate.asks_base else {}),
        }

        def find(work: Path) -> str:
            scoring = self._leading_scoring()

            def scored(example: Example, text: str) -> float:
                return scoring(Answered(text, example.answer, example.request))

            return search_prompts(
                self.project.store,
                settings,
                candidate,
                prompts,
                self.dataset,
                self.answerer,
                scored,
                work,
                self.progress,
            )

        digest = self._stage(f"search {candidate.name}", "search", inputs, find)
        chosen = with_choice(candidate, *found_choice(self.project.store, digest, self.dataset))
        return chosen.model_copy(update={"search": digest})

    def _train(self, name: str, candidate: Candidate, settings: TrainSettings, restart: bool) -> str:
        if candidate.shots:
            raise UsageError(
                "a candidate with shots cannot be trained: some rows would hold their own answers",
                where=f"candidates.{name}",
                fix="remove shots or train; or name another's adapter with weights:",
            )
        if self.project.settings.data.sign_off:
            require_signed(self.project.store, self.dataset.digest)
        looks_up = {key: getattr(candidate, key) for key in ("documents", "embedder") if getattr(candidate, key)}
        if candidate.retrieve is not None:
            looks_up["retrieve"] = candidate.retrieve.model_dump(mode="json", by_alias=True)
        inputs = {
            **looks_up,
            "base": self.base.digest,
            "dataset": self.dataset.digest,
            "prompt": candidate.prompt,
            "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        }

        def fit(work: Path) -> str:
            from tunesmith.training.train import TrainingRow, train

            answerer = Answerer(self.project.store, self.engine, candidate)

            def rows(examples: Sequence[Example]) -> list[TrainingRow]:
                # Looked up without the row's own group, as it will be for requests of groups that were never seen.
                return [
                    TrainingRow(each.id, compose(candidate, each.messages, answerer.without_group(each)))
                    for each in examples
                ]

            return train(
                self.project.store,
                base=self.base,
                dataset=self.dataset.digest,
                rows=rows(training_rows(self.dataset.examples("train"), settings)),
                validation=rows(self.dataset.examples("validation")),
                settings=settings,
                work=work / "checkpoints",
                restart=restart,
                progress=self.progress,
            )

        return self._stage(f"train {name}", "train", inputs, fit, again=restart)

    # Answers

    @cached_property
    def _choices(self) -> tuple[str, ...]:
        """The labels whose likelihood is asked for beside every answer; none where no scorer wants that."""
        if not any(scorer.calibrate for scorer in self.project.settings.task.labels):
            return ()
        found = sorted({example.answer for example in self.dataset.examples("train")})
        if len(found) > _MOST_LABELS:
            raise UsageError(
                f"{len(found)} distinct answers are too many to ask the likelihood of each (at most {_MOST_LABELS})",
                where="task.scorers, calibrate",
                fix="leave calibrate out",
            )
        return tuple(found)

    def _ask(self, name: str, digest: str, split: str, work: Path) -> str:
        """Ask a candidate every row of a split, keeping what is there after each handful."""
        candidate, dataset = load_candidate(self.project.store, digest), self.dataset
        rows = dataset.examples(split)
        if candidate.endpoint is not None:
            sent = f"the requests of {len(rows)} held-out rows, with all that stands before them"
            self.progress.say(f"{name}: {sent}, are sent to {candidate.endpoint.url}")
        answerer = self.answerer(candidate)
        title = f"{name} answers {len(rows)} rows"
        asked = ask_rows(answerer, rows, work, title, self.progress, self._likelihoods(candidate))
        parents = {"candidate": digest, "dataset": dataset.digest}
        return keep_answers(self.project.store, parents, asked.lines, asked.body(split) | self._engine_of(digest))

    def _likelihoods(self, candidate: Candidate) -> Likelihoods | None:
        choices = self._choices
        if not choices or not candidate.asks_base:
            return None
        engine = self.engine

        def likelihoods(conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]:
            questions = [Question(tuple(turns), tuple(choices)) for turns in conversations]
            return [dict(zip(choices, each, strict=True)) for each in engine.choose(questions, candidate.training)]

        return likelihoods

    def load_adapter(self, training: str | None) -> str | None:
        """Make a training's adapter answerable; returns the name to ask for."""
        if training is None:
            return None
        store = self.project.store
        record = store.record(training, kind="training")
        folder = store.root / "work" / f"adapter-{training.removeprefix('sha256:')[:24]}"
        for name, blob in record.blobs.items():
            write_atomic(folder / name, store.read_blob(blob))
        self.engine.load_adapter(training, folder)
        shutil.rmtree(folder)
        return training


def _task_inputs(task: TaskSettings) -> dict[str, Any]:
    """What of the task an evaluation depends on: not how a judge is reached, which its own stage knows."""
    stated = task.model_dump(mode="json")
    for scorer in stated["scorers"]:
        if isinstance(scorer, dict):
            scorer.pop("judge", None)
    return stated


def tuned_names(project: Project) -> list[str]:
    """The candidates that are trained for their own sake: controls are not among them."""
    candidates = project.settings.candidates.items()
    return [name for name, settings in candidates if settings.train and not settings.train.permute_answers]


# What the verbs call


def build_data(project: Project, progress: Progress = SILENT, shards: ShardEngine | None = None) -> str:
    """Digest of the project's dataset version. shards: who reads the source files' shards; this machine by default."""
    return Chain(project, progress, shards=shards or Local()).dataset.digest


def train(project: Project, progress: Progress = SILENT, name: str | None = None, restart: bool = False) -> str:
    """Digest of a candidate's training; by default that of the only tuned candidate."""
    walk = Chain(project, progress)
    if name is None:
        tuned = tuned_names(project)
        if len(tuned) != 1:
            raise UsageError(f"{len(tuned)} candidates are trained", fix=f"name one: {', '.join(tuned) or 'none is'}")
        name = tuned[0]
    return walk.training(name, restart)


def evaluate(project: Project, progress: Progress = SILENT, names: Sequence[str] | None = None) -> str:
    """Digest of an evaluation."""
    return Chain(project, progress).evaluation(names)


def gate(project: Project, progress: Progress = SILENT, name: str | None = None) -> str:
    """Digest of a verdict."""
    return Chain(project, progress).verdict(name)


def latest_evaluation(project: Project) -> str | None:
    """The newest evaluation in the project's store."""
    found = project.store.records_of("evaluation")
    return found[-1] if found else None


def latest_verdict(project: Project, name: str | None = None) -> str | None:
    """The newest verdict in the project's store, on the candidate of that name where one is given."""
    for digest in reversed(project.store.records_of("verdict")):
        if name is None or project.store.record(digest).body["name"] == name:
            return digest
    return None


def register(
    project: Project, verdict: str, *, actor: str, override: str | None = None, tenant: str = "", region: str = ""
) -> Version:
    """Sign and register a judged candidate under the project's name."""
    return register_version(
        project.store,
        name=project.settings.name,
        verdict=verdict,
        actor=actor,
        tenant=tenant,
        region=region,
        override=override,
    )


def run(project: Project, progress: Progress = SILENT, *, actor: str | None = None) -> dict[str, Any]:
    """The whole chain up to a registered version; what `tunesmith run --json` prints.

    Where the gates do not pass nothing is registered and the document has no `register`; `gate` says why.
    """
    store = project.store
    signer = project.actor(actor)
    walk = Chain(project, progress, signer)
    verdict = walk.verdict()
    evaluation = store.record(verdict).parents["evaluation"]
    document: dict[str, Any] = {
        "data": dataset_document(store, walk.dataset.digest),
        "train": {
            name: training_document(project, walk.training(name))
            for name, settings in project.settings.candidates.items()
            if settings.train
        },
        "evaluate": evaluation_document(store, evaluation),
        "gate": verdict_document(store, verdict),
    }
    outcome = document["gate"]["verdict"]
    if outcome == "pass":
        began = time.perf_counter()
        version = register(project, verdict, actor=signer)
        document["register"] = {"version": version.label, "digest": version.digest}
        walk.stages.append(Stage("register", time.perf_counter() - began, skipped=False))
    document["stages"] = [vars(stage) for stage in walk.stages]
    return document


def training_document(project: Project, digest: str) -> dict[str, Any]:
    """What `tunesmith train --json` prints."""
    record = project.store.record(digest, kind="training")
    body = record.body
    shown = (
        "examples_per_second",
        "tokens_per_second",
        "seconds",
        "peak_memory_bytes",
        "estimate",
        "final_loss",
        "rows",
        "steps",
        "tokens",
        "tokens_computed",
        "labels",
        "parameters",
        "validation",
        "notices",
    )
    adapter = project.store.blob_path(record.blobs["adapter_model.safetensors"])
    return {"training": digest, "adapter": str(adapter), **{key: body[key] for key in shown if key in body}}
