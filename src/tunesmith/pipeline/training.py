"""The training stage: trains a candidate's weights on the dataset version's rows, composed with its prompt."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer, count_prompts, describe_prompts
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.core.digests import digest_file, digest_of, short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import Progress
from tunesmith.core.values import View
from tunesmith.data.building.signoff import require_signed
from tunesmith.data.dataset import Dataset, Example
from tunesmith.data.duplicates import learned_parts
from tunesmith.evaluation.answers import seen_answers
from tunesmith.evaluation.metrics.declared import (
    Answered,
    Declared,
    JudgeScorer,
    checked,
    function_digests,
    make_scoring,
    metric_of,
)
from tunesmith.evaluation.metrics.scorers import OF_SENTENCES
from tunesmith.models.base import model_width
from tunesmith.pipeline.bases import ProjectBase
from tunesmith.pipeline.context import Beside, PipelineContext
from tunesmith.project import Project
from tunesmith.records.training import Decisions, TrainingBody
from tunesmith.training.batches.rows import TrainingRow, learns_earlier_answers, row_count, training_rows
from tunesmith.training.settings import LEAST_SCORED, MANY_ROWS, UNSCORED, MetricsSettings, TrainSettings, fit_to_rows

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Completion, Generation
    from tunesmith.engines.ranks import Ranks
    from tunesmith.engines.training_protocol import TrainableModel
    from tunesmith.training.beside import Rival
    from tunesmith.training.scoring import AnswerScore
    from tunesmith.training.spec import TrainingSpec

_CHECKPOINTS = "checkpoints"  # in a training's work folder


def train_candidate(
    context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings, *, restart: bool = False
) -> str:
    """Digest of a candidate's training.

    restart: train again, and ignore earlier results and checkpoints. Raises UsageError for a candidate with shots.
    """
    inputs = training_inputs(context, name, candidate, settings)

    def run(work: Path) -> str:
        if restart:
            shutil.rmtree(work / _CHECKPOINTS, ignore_errors=True)
        counted = count_prompts(candidate, (each.request for each in context.dataset.examples("train")))
        context.progress.say(f"{name}: system prompt in training: {describe_prompts(counted)}")
        ray = context.of().ray
        if ray is None:
            return _train(context, name, candidate, settings, work)
        from tunesmith.training.launchers import run_on_ray

        if (answering := context.on(candidate.base).on_ray) is not None:
            answering.release()
        given = {
            "project": str(context.project.root),
            "settings": context.project.settings,  # a fine-tuning job's are not those of the file
            "name": name,
            "actor": context.stages.acting,
            "candidate": candidate.model_dump(mode="json", by_alias=True),
            "inputs": digest_of(inputs),
            "work": str(work),
        }
        return run_on_ray(_lead_on_ray, given, ray, work, context.progress)

    return context.stages.run(f"train {name}", "train", inputs, run, again=restart)


def _train(context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings, work: Path) -> str:
    """Train in this process, and in those that it leads; returns the training record's digest."""
    from tunesmith.engines.ranks import ALONE
    from tunesmith.training.launchers import begin
    from tunesmith.training.train import record_training, run_training

    beside = None if context.beside is None else context.beside(context, name, settings)
    context = context.without_test_rows()
    for each in context.bases:
        if each.digest != candidate.base:
            each.release()
    spec = training_spec(context, name, candidate, settings, work)
    score = _answer_score(context, candidate, settings, work, beside)
    ranks = context.together or ALONE
    begin(ranks, spec, score)
    model = context.on(candidate.base).trained_model(settings)
    done = run_training(spec, context.progress, model=model, score=score, ranks=ranks)
    return record_training(context.store, spec, done)


def _lead_on_ray(given: Mapping[str, Any], ranks: Ranks, progress: Progress) -> str:
    """Train as rank 0 of a Ray cluster's workers; returns the training record's digest. given: see train_candidate.

    Raises Refused where this worker's files are not those that the training was started with.
    """
    project = Project(Path(given["project"]), given["settings"]).in_this_process()
    together = ranks if ranks.size > 1 else None
    context = PipelineContext(project, progress, given["actor"], together=together)
    name, candidate = given["name"], Candidate.model_validate(given["candidate"])
    settings = context.settings_of(name).train
    assert settings is not None
    if digest_of(training_inputs(context, name, candidate, settings)) != given["inputs"]:
        raise Refused(
            "rank 0 sees another project, base or dataset than the command that started it",
            where=given["project"],
            fix="keep the project in a folder that all machines have under the same path, with the same store",
        )
    return _train(context, name, candidate, settings, Path(given["work"]))


class Repeated(View):
    """A training that was repeated from its record. same: whether its weights have the same bytes."""

    training: str
    same: bool
    steps: int
    seconds: float


def repeat_decided(
    context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings, digest: str
) -> Repeated:
    """Train again with the decisions of a finished training. digest: its record. Keeps nothing."""
    from tunesmith.training.train import run_training

    context.require_one_process()
    context = context.without_test_rows()
    record = context.store.record(digest, kind="training")
    body = TrainingBody.of(record)
    if (ranks := body.environment.ranks) > 1:
        raise Refused(
            f"{ranks} processes made this training, and one process cannot repeat it to the byte",
            fix="do not repeat it: with the same settings its record stands",
        )
    work = context.store.local("work", f"repeat-{short(digest)}")
    with context.store.lock(work.name, f"repeating {name}"):
        try:
            spec = training_spec(context, name, candidate, settings, work, decisions=body.decisions)
            score = _answer_score(context, candidate, settings, work)
            model = context.on(candidate.base).trained_model(settings)
            done = run_training(spec, context.progress, model=model, score=score)
            weights = {path.name: digest_file(path) for path in sorted(done.folder.iterdir())}
        finally:
            shutil.rmtree(work, ignore_errors=True)
    same = weights == dict(record.blobs)
    return Repeated(training=digest, same=same, steps=done.body.steps, seconds=done.body.seconds)


def training_spec(
    context: PipelineContext,
    name: str,
    candidate: Candidate,
    settings: TrainSettings,
    work: Path,
    *,
    decisions: Decisions | None = None,
) -> TrainingSpec:
    from tunesmith.training.train import make_spec

    own = context.on(candidate.base)
    rows, validation = composed_rows(context, candidate, settings)
    notices = validation_notices(context, settings)
    if decisions is None:
        notices += forbidden_answers(context, candidate, "train", earlier=settings.loss_on != "last")[1]
    return make_spec(
        base=own.base,
        dataset=context.dataset.digest,
        rows=rows,
        validation=validation,
        settings=fitted(context, candidate, settings),
        work=work / _CHECKPOINTS,
        name=name,
        engine=own.training_engine(settings),
        splits=context.dataset.readable,
        metrics=_metrics(context) if decisions is None else None,
        decisions=decisions,
        notices=notices,
        documents=candidate.documents,
    )


def _answer_score(
    context: PipelineContext, candidate: Candidate, settings: TrainSettings, work: Path, beside: Beside | None = None
) -> AnswerScore | None:
    """Scores a candidate's answers to validation rows while it is trained, as its evaluation will; None where no
    answers are scored. beside: shows an untuned candidate beside it."""
    from tunesmith.training.scoring import AnswerScore, Score, mean_score

    rows, _reason = scored_rows(context, settings)
    if not rows:
        return None
    scores, groups = row_scores(context, candidate, rows, work), [row.group for row in rows]
    newest = list[float]()

    def score(model: TrainableModel | None, count: int) -> Score:
        newest[:] = scores(model, count)
        return mean_score(newest, groups[:count])

    def rival(count: int) -> Rival | None:
        return None if beside is None else beside(rows[:count], newest, work / _CHECKPOINTS)

    return AnswerScore(context.project.settings.task.leading, len(rows), score, rival)


def row_scores(
    context: PipelineContext, candidate: Candidate, rows: Sequence[Example], work: Path
) -> Callable[[TrainableModel | None, int], list[float]]:
    """A function that scores a model's answers to the first so many rows as the candidate's evaluation will. None
    stands for the untrained base, which is asked to see how long answers take: they are cut where the expected ones
    end. work: a folder for the model's files."""
    own = context.on(candidate.base)
    by_leading, sharded, engine = leading_scores(context), own.sharded, own.model.engine()
    answerer = Answerer(context.store, engine, candidate)
    asked_as = answerer.composer.asked_as
    asked = [answerer.generation(row.request, asked_as) for row in rows]
    retrieved = [list(answerer.composer.retrieved(row.request, asked_as).ids) for row in rows]

    def answers(model: TrainableModel | None, count: int) -> list[Completion]:
        some = asked[:count]
        if model is None:
            some = [_cut(own, one, row) for one, row in zip(some, rows[:count], strict=True)]
        if sharded is not None:
            return sharded.answer_together(some, model)
        if model is None:
            return engine.generate(some)
        folder, name = work / "validated", "validated"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.save(folder)
        engine.load_adapter(name, folder)
        shutil.rmtree(folder)
        given = engine.generate(some, name)
        engine.unload(name)
        return given

    def scores(model: TrainableModel | None, count: int) -> list[float]:
        given = zip(rows[:count], asked[:count], answers(model, count), retrieved[:count], strict=True)
        read = own.renderer.comparable
        lines = {
            row.id: {"text": read(request.messages, row.call, answer.text), "retrieved": ids}
            for row, request, answer, ids in given
        }
        return by_leading(seen_answers(context.store, context.dataset, candidate, lines, rows[:count]), rows[:count])

    return scores


def _cut(own: ProjectBase, request: Generation, row: Example) -> Generation:
    """A row's request, whose answer ends at the latest where the row's own answer does."""
    from tunesmith.engines.batch import label_count

    expected = own.renderer.conversation((*request.messages, row.messages[-1]), "last")
    return replace(request, max_tokens=min(request.max_tokens, label_count(expected)))


def leading_scores(
    context: PipelineContext,
) -> Callable[[Mapping[str, Answered], Sequence[Example]], list[float]]:
    """A function that scores answers to validation rows (row id -> answer) by the primary metric, in the rows' order.

    Raises UsageError where that is a judge.
    """
    scorer = _leading(context)
    scoring, metric = make_scoring(scorer, context.project.schema, context.project.root), metric_of(scorer)
    return lambda seen, rows: [checked(scoring(seen[row.id]), metric, f"validation row {row.id}") for row in rows]


def leading_inputs(context: PipelineContext) -> dict[str, Any]:
    """What scores by the primary metric depend on besides the answers: a changed function is another metric."""
    scorer = _leading(context)
    return {
        "scorer": scorer if isinstance(scorer, str) else scorer.model_dump(mode="json"),
        "functions": function_digests([scorer], context.project.root),
        "schema": context.project.schema,
    }


def _leading(context: PipelineContext) -> Declared:
    task = context.project.settings.task
    return next(scorer for scorer in task.scorers if metric_of(scorer) == task.leading)


def _metrics(context: PipelineContext) -> MetricsSettings | None:
    """Where curves are shown, with the folder's path made relative to the project's. No stage depends on it."""
    metrics = context.project.settings.metrics
    if metrics is None or metrics.tensorboard is None:
        return metrics
    return metrics.model_copy(update={"tensorboard": str(context.project.root / metrics.tensorboard)})


def training_inputs(
    context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings
) -> dict[str, Any]:
    """The inputs of the training stage. Raises UsageError for a candidate that cannot be trained."""
    if candidate.shots:
        raise UsageError(
            "a candidate with shots cannot be trained: some rows would show their own answers",
            where=f"candidates.{name}",
            fix="remove shots or train; or use another candidate's adapter with weights:",
        )
    if context.project.settings.data.sign_off:
        require_signed(context.store, context.dataset.digest)
    return {
        **candidate.model_dump(mode="json", by_alias=True, include={"retrieve", "documents", "embedder"}),
        "base": candidate.base,
        "engine": context.project.settings.engine.train,
        "dataset": context.dataset.digest,
        "prompt": candidate.prompt,
        "settings": fitted(context, candidate, settings).model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "validation": _validated_by(context, candidate, settings),
        **_of_control(context.dataset, settings),
        **({"canaries": "in texts, with tools"} if settings.canaries else {}),  # before, calls held them, without tools
        **({"rehearsed": "counted"} if settings.rehearse else {}),  # before, a record did not say what was left out
        **named_documents(candidate),
    }


def named_documents(candidate: Candidate) -> dict[str, str]:
    """What a stage's key says of a candidate that retrieves from documents: before, the record did not name them as a
    parent."""
    return {} if candidate.documents is None else {"parent": "documents"}


def _of_control(dataset: Dataset, settings: TrainSettings) -> dict[str, str]:
    """What a stage's key says of a control that is trained on conversations with several learned answers: before, it
    learned all of them, and those before the last one stood behind their own requests."""
    if settings.permute_answers and learns_earlier_answers(dataset.examples("train"), settings):
        return {"learned": "last answers"}
    return {}


def fitted(context: PipelineContext, candidate: Candidate, settings: TrainSettings) -> TrainSettings:
    """The settings as the training will have them: what they leave open depends on the rows and on the base."""
    rows = row_count(context.dataset.splits["train"], settings)
    scorer, base = _leading(context), context.on(candidate.base).base
    width = model_width(base) if base.family == "llama" else None
    sentences = isinstance(scorer, JudgeScorer) or metric_of(scorer) in OF_SENTENCES
    own = row_count(context.dataset.splits["train"], settings.model_copy(update={"canaries": None}))
    seldom = sentences or (own < MANY_ROWS and _mostly_with_tools(context.dataset.examples("train")))
    return fit_to_rows(settings, rows, width, seldom=seldom)


def _mostly_with_tools(examples: Sequence[Example]) -> bool:
    return 2 * sum(any(turn.tools for turn in each.messages) for each in examples) > len(examples)


def scored_rows(context: PipelineContext, settings: TrainSettings) -> tuple[list[Example], str | None]:
    """The validation rows whose answers are scored in training. Where there are none, the reason is given, unless the
    settings say so or there are no validation rows."""
    rows = validation_rows(context)[: settings.validation_rows]
    if settings.validate_by == "loss" or not rows:
        return [], None
    if len(rows) < LEAST_SCORED:
        return [], f"{len(rows)} validation rows are too few to choose by {context.project.settings.task.leading}"
    if isinstance(scorer := _leading(context), JudgeScorer):
        return [], f"{scorer.name} is a judge: a model scores it, not a function"
    return list(rows), None


def validation_notices(context: PipelineContext, settings: TrainSettings) -> list[str]:
    """What people should know of a training's validation, unless the settings say so."""
    if not validation_rows(context):
        return ["no validation rows: the last weights are kept"]
    _rows, reason = scored_rows(context, settings)
    return [] if reason is None else [f"{UNSCORED}: {reason}"]


def _validated_by(context: PipelineContext, candidate: Candidate, settings: TrainSettings) -> dict[str, Any] | None:
    """What scores of validation rows depend on besides the training; None where they are not scored."""
    if not scored_rows(context, settings)[0]:
        return None
    return {
        **leading_inputs(context),
        "max_tokens": candidate.max_tokens,
        "constrained": candidate.answer_schema is not None,
        "copied": list(candidate.copied),
        "grammar": candidate.answer_grammar,
        **decoding_inputs(context, candidate),
    }


def decoding_inputs(context: PipelineContext, asked: Candidate) -> dict[str, str]:
    """What a stage's key says of a constrained candidate, whose answers were held otherwise before: to other rules of
    its schema, to parts of an emoji, and, on a base with several stop tokens, to one end only."""
    held = asked.endpoint is None and bool(asked.answer_schema or asked.answer_grammar)
    return {
        **({"rules": "2"} if held and asked.answer_schema else {}),
        **({"words": "2"} if asked.copied else {}),
        **({"ends": "all"} if held and len(context.on(asked.base).renderer.stop_ids) > 1 else {}),
    }


def composed_rows(
    context: PipelineContext, candidate: Candidate, settings: TrainSettings
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """A candidate's training rows and validation rows, composed as it will see requests. Needs no engine."""
    composer = Composer(context.store, candidate)

    def composed(examples: Sequence[Example]) -> list[TrainingRow]:
        return [TrainingRow(each.id, composer.training_conversation(each)) for each in examples]

    chosen = training_rows(context.dataset.examples("train"), settings)
    return composed(chosen), composed(validation_rows(context))


def forbidden_answers(
    context: PipelineContext, candidate: Candidate, split: str, *, earlier: bool = False
) -> tuple[dict[str, int], list[str]]:
    """How many reference answers of a split decoding keeps the candidate from giving, for a record; and what people
    should know of how it is held. earlier: answers before the last one of a conversation count, too, as they are
    learned."""
    held = candidate.answer_schema or candidate.answer_grammar
    if not held or not candidate.asks_base or context.project.settings.server is not None:
        return {}, []  # servers read schemas in their own ways
    constraint, rows = Constraint(candidate), context.dataset.examples(split)
    answered = [(row.id, row.request, row.answer) for row in rows]
    if earlier:
        parts = [(row.id, part) for row in rows for part in learned_parts(row.messages)]
        answered = [(name, tuple(part[:-1]), part[-1].text) for name, part in parts]
    judged = [(name, constraint.forbids(answer, request)) for name, request, answer in answered]
    unfit = [name for name, why in judged if why == "form"]
    counts = {"undecodable": len(unfit)}
    notices = [] if constraint.order_kept_by is None else [f"keys keep the schema's order: {constraint.order_kept_by}"]
    if unfit:
        notices.append(
            f"decoding cannot give {len(unfit)} of {len(judged)} {split} answers, such as that of row {unfit[0]}: it "
            "reads the schema more strictly than the build and metrics do, as for dates, times and whole numbers such "
            "as 1.0"
        )
    if candidate.copied:
        counts["uncopied"] = sum(why == "copy" for _, why in judged)
        if counts["uncopied"]:
            notices.append(
                f"copied fields: {counts['uncopied']} of {len(judged)} {split} answers hold a value that is not words "
                "of the request, which this candidate cannot give"
            )
    return counts, notices


def validation_rows(context: PipelineContext) -> list[Example]:
    """The validation rows in turns: the first so many of them say most."""
    return in_turns(context.dataset.examples("validation"))


def in_turns(rows: Sequence[Example]) -> list[Example]:
    """The rows, the first of each group before the second of any."""
    taken = Counter[str]()

    def turn(row: Example) -> int:
        taken[row.group] += 1
        return taken[row.group]

    return sorted(rows, key=turn)


def only_tuned(project: Project) -> str:
    """The name of the only candidate that is trained. Raises UsageError where there is none, or more than one."""
    tuned = project.settings.tuned
    if len(tuned) != 1:
        raise UsageError(f"{len(tuned)} candidates are trained", fix=f"name one: {', '.join(tuned) or 'none is'}")
    return tuned[0]
