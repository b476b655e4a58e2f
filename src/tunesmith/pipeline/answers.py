"""The stages `answer` and `judge`: answers to held-out rows, and judgements of them. Also plans the gates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from tunesmith.candidates.asking import TOGETHER, Likelihoods, ask_rows, keep_answers
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import count_prompts, describe_prompts
from tunesmith.core.errors import Inconclusive, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.answers import read_answers
from tunesmith.evaluation.gates.settings import compared_metrics
from tunesmith.evaluation.gates.test_set_uses import nameless, used_candidates
from tunesmith.evaluation.metrics.answer_judge import judge_answers
from tunesmith.evaluation.metrics.declared import JudgeScorer, make_scoring, metric_of
from tunesmith.evaluation.planning import Assumed, Plan, measured_on_validation, plan_gates
from tunesmith.pipeline.candidates import answerer, candidate, trained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import decoding_inputs, forbidden_answers, leading_scores

_MOST_LABELS = 64


def answers(context: PipelineContext, name: str, split: str = "test") -> str:
    """Digest of a candidate's answers to the rows of a split."""
    given = answers_of(context, candidate(context, name), split)
    if split == "test":
        context.answered[name] = given
    return given


def answers_of(context: PipelineContext, digest: str, split: str, first: Sequence[Example] = ()) -> str:
    """Digest of the answers of a candidate record to the rows of a split. first: only to these, which are the first
    ones in turns."""
    asked = load_candidate(context.store, digest)
    endpoint, named = context.settings_of(asked.name).endpoint, asked.name
    choices = _choices(context) if asked.asks_base else ()
    parents = {"candidate": digest, "dataset": context.dataset.digest}
    inputs = {
        **parents,
        "split": split,
        "together": TOGETHER,
        "engine": context.engine_of(asked),
        "choices": list(choices),
        "logprobs": endpoint is not None and endpoint.logprobs,
        # Answers of before lack the row's tools, and are empty where the endpoint refused in a field of its own.
        **({} if endpoint is None else {"tools": True, "refusals": True}),
        **decoding_inputs(context, asked),
        **({"labels": "bare"} if choices else {}),  # before, a label's confidence depended on its case
        **({"first": len(first)} if first else {}),
    }

    def answer(work: Path) -> str:
        if split == "test":
            _show_plan(context)
        rows = first or context.dataset.examples(split)
        if asked.endpoint is not None:
            context.progress.say(f"{named}: sending {len(rows)} {split} requests with prompts to {asked.endpoint.url}")
        counted = count_prompts(asked, (row.request for row in rows))
        context.progress.say(f"{named}: system prompt: {describe_prompts(counted)}")
        forbidden, notices = ({}, []) if first else forbidden_answers(context, asked, split)
        for notice in notices:
            context.progress.say(f"{named}: {notice}")
        likelihoods = _likelihoods(context, asked, choices) if choices else None
        title = f"{named} answers {len(rows)} rows"
        given = ask_rows(answerer(context, asked), rows, work, title, context.progress, likelihoods)
        body = given.body(split, engine=context.engine_of(asked), **forbidden)
        return keep_answers(context.store, parents, given.lines, body)

    stage = f"answer {named}" if split == "test" else f"answer {named} {split}"
    stage += f", {len(first)} rows" if first else ""
    return context.stages.run(stage, "answer", inputs, answer)


def scores_of(context: PipelineContext, given: str, split: str, rows: Sequence[Example] = ()) -> list[float]:
    """Scores by the primary metric of answers to a split's rows, or to these of them, in their order. given: digest of
    the answers. Raises UsageError where the metric is a judge."""
    rows = rows or context.dataset.examples(split)
    return leading_scores(context)(read_answers(context.store, given, context.dataset, rows, split).seen, rows)


def judged(context: PipelineContext, name: str, given: str, scorer: JudgeScorer) -> str:
    """Digest of a judge's judgements of a candidate's answers. given: digest of the answers."""
    dataset = context.dataset
    question = {"model": scorer.judge.model, "url": scorer.judge.url, "question": scorer.question}
    inputs = {"answers": given, "metric": scorer.name, **question}

    def ask_judge(work: Path) -> str:
        context.progress.say(f"{scorer.name}: sending held-out rows and answers to {scorer.judge.url}")
        test = dataset.examples("test")
        return judge_answers(context.store, scorer, given, dataset.digest, test, work, context.progress)

    return context.stages.run(f"{scorer.name} judges {name}", "judge", inputs, ask_judge)


def plan(
    context: PipelineContext, lift: float | None = None, differing: float | None = None, between: Sequence[str] = ()
) -> Plan:
    """What the test rows can show. between: candidates whose answers to the validation rows show how they differ, by
    the metric of each gate that no judge scores."""
    assumed = Assumed() if differing is None else Assumed(differing)
    dataset, project, gates = context.dataset, context.project, context.project.settings.gates
    measured = None
    if between:
        compared = {metric for gate in gates.values() for metric in compared_metrics(gate)}
        scorings = {
            metric_of(scorer): make_scoring(scorer, project.schema, project.root)
            for scorer in project.settings.task.scorers
            if metric_of(scorer) in compared and not isinstance(scorer, JudgeScorer)
        }
        given = [answers(context, name, "validation") for name in between]
        measured = measured_on_validation(context.store, given, dataset, scorings)
    used = used_candidates(context.store, dataset.digest)
    new = _new_uses(context, used)
    return plan_gates(dataset, gates, uses=len(used), new=new, assumed=assumed, measured=measured, lift=lift)


def _new_uses(context: PipelineContext, used: Collection[str]) -> int:
    """How many candidates the next evaluation will count as new uses of the test rows; 1 at least, for another try."""
    project, new = context.project, 0
    for name, settings in project.settings.candidates.items():
        trains = settings.weights or name
        if not settings.adapted or trains not in project.settings.tuned:
            continue
        try:
            trained = trained_candidate(context, name)
        except TunesmithError:  # such as rows that nobody has signed off yet
            trained = None
        new += trained is None or nameless(trained) not in used
    return max(1, new)


def _show_plan(context: PipelineContext) -> None:
    """Show once, before the first test rows are answered, how large a lift the gates can detect."""
    if not context.plan_shown:
        context.plan_shown = True
        try:
            power = plan(context)
        except Inconclusive as error:  # the scores are of use without it, and the gates say the same
            context.progress.say(error.what)
            return
        for gate in power.gates:
            context.progress.say(power.sentence(gate))


def _choices(context: PipelineContext) -> tuple[str, ...]:
    """The labels whose probabilities are measured for each answer; empty where no scorer calibrates."""
    if not any(scorer.calibrate for scorer in context.project.settings.task.labels):
        return ()
    labels = sorted({example.answer for example in context.dataset.examples("train")})
    if len(labels) > _MOST_LABELS:
        raise UsageError(
            f"calibrate measures at most {_MOST_LABELS} labels, and the training rows have {len(labels)}",
            where="task.scorers, calibrate",
            fix="leave calibrate out",
        )
    return tuple(labels)


def _likelihoods(context: PipelineContext, asked: Candidate, choices: Sequence[str]) -> Likelihoods:
    """A function that gives, for each conversation, the log-probability of each choice as its answer."""
    engine = context.on(asked.base).engine

    def likelihoods(conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]:
        questions = [Question(tuple(turns), tuple(choices)) for turns in conversations]
        return [dict(zip(choices, each, strict=True)) for each in engine.choose(questions, asked.training)]

    return likelihoods
