"""Makes candidate records from the project file: prompt, shots (chosen or searched for), retrieval, trained adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.candidates.grammars.copying import check_constraint, copied_fields
from tunesmith.candidates.optimise import (
    Asker,
    Spent,
    choose,
    described,
    keep_search,
    searched,
    tried_rows,
    with_choice,
)
from tunesmith.candidates.retrieval import choose_shots
from tunesmith.candidates.rewriting import Rewriter
from tunesmith.candidates.settings import CandidateSettings, Optimise
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.reading.text_files import inside, read_text_file
from tunesmith.core.system.files import write_atomic
from tunesmith.data.dataset import Example
from tunesmith.evaluation.answers import seen_answers
from tunesmith.pipeline.bases import ProjectBase
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import (
    Repeated,
    decoding_inputs,
    leading_inputs,
    leading_scores,
    named_documents,
    repeat_decided,
    train_candidate,
    training_inputs,
)
from tunesmith.pipeline.training_search import search_settings
from tunesmith.records.candidate import RemoteModel
from tunesmith.records.training import SearchBody
from tunesmith.registry.serving import may_load
from tunesmith.registry.versions import resolve
from tunesmith.store.records import recalled
from tunesmith.store.tables import CHAMPION
from tunesmith.training.settings import TrainSettings


def candidate(context: PipelineContext, name: str, restart: bool = False) -> str:
    """Digest of a candidate of the project file. Trains its adapter first where that is not done yet."""
    settings = context.settings_of(name)
    if settings.version is not None:
        return put_candidate(context.store, _registered(context, name, settings.version))
    made = untrained_candidate(context, name, settings)
    if settings.train is not None:
        trained = train_candidate(context, name, made, settings.train, restart=restart)
        made = made.model_copy(update={"training": trained})
    elif settings.weights is not None:
        made = made.model_copy(update={"training": training(context, settings.weights)})
    return put_candidate(context.store, made)


def trained_candidate(context: PipelineContext, name: str) -> Candidate | None:
    """A candidate with trained weights as it will be, if nothing has to run for it any more; else None.

    For one whose prompt a search finds or that retrieves, this is not known before its stages run.
    """
    settings = context.settings_of(name)
    of = settings.weights or name
    own = context.settings_of(of)
    if own.train is None or any(each.prompt_of or each.retrieve for each in (settings, own)):
        return None
    inputs = training_inputs(context, of, untrained_candidate(context, of, own), own.train)
    trained = context.stages.known("train", inputs)
    untrained = untrained_candidate(context, name, settings)
    return None if trained is None else untrained.model_copy(update={"training": trained})


def training(context: PipelineContext, name: str, restart: bool = False) -> str:
    """Digest of a candidate's training. Raises UsageError for a candidate that has none."""
    trained = load_candidate(context.store, candidate(context, name, restart)).training
    if trained is None:
        raise _no_training(context, name)
    return trained


def better_settings(context: PipelineContext, name: str, trials: int, within: float | None) -> str:
    """Digest of a search for better training settings of a candidate. Raises UsageError for one that is not trained."""
    return search_settings(context, name, *_trained(context, name), trials, within)


def repeat_training(context: PipelineContext, name: str) -> Repeated:
    """Train a candidate again with the decisions of its finished training, and compare the weights. Keeps nothing.

    Raises UsageError for a candidate that is not trained, or whose training has not ended with what the project states.
    """
    untrained, train = _trained(context, name)
    if context.stages.known("train", training_inputs(context, name, untrained, train)) is None:
        raise UsageError(
            f"no training of {name!r} has ended with these rows, base and settings, so there is none to repeat",
            where=f"candidates.{name}.train",
            fix=NextStep("train it first", "train", candidate=name),
        )
    return repeat_decided(context, name, untrained, train, train_candidate(context, name, untrained, train))


def _trained(context: PipelineContext, name: str) -> tuple[Candidate, TrainSettings]:
    """A candidate before its training, and the settings of that. Raises UsageError where it is not trained."""
    settings = context.settings_of(name)
    if settings.train is None:
        raise _no_training(context, name)
    return untrained_candidate(context, name, settings), settings.train


def answerer(context: PipelineContext, asked: Candidate) -> Answerer:
    """A candidate that is ready to answer, with its adapter loaded."""
    settings = context.project.settings.candidates.get(asked.name)
    own = context.on(asked.base)
    engine, renderer = (own.engine, own.renderer) if asked.asks_base else (None, None)
    load_adapter(context, asked.training)
    return Answerer(context.store, engine, asked, settings.endpoint if settings else None, renderer)


def load_adapter(context: PipelineContext, trained: str | None) -> str | None:
    """Load a training's adapter into the engine of its base; returns the adapter's name there."""
    if trained is None:
        return None
    store = context.store
    record = store.record(trained, kind="training")
    folder = store.local("work", f"adapter-{trained.removeprefix('sha256:')[:24]}")
    for name, blob in record.blobs.items():
        write_atomic(folder / name, store.read_blob(blob))
    context.on(record.parents["base"]).engine.load_adapter(trained, folder)
    shutil.rmtree(folder)
    return trained


def _no_training(context: PipelineContext, name: str) -> UsageError:
    tuned = [each for each, settings in context.project.settings.candidates.items() if settings.train]
    return UsageError(
        f"candidate {name!r} has no training",
        where=f"candidates.{name}",
        fix=f"name one of {', '.join(tuned)}" if tuned else "give it `train:`",
    )


def untrained_candidate(context: PipelineContext, name: str, settings: CandidateSettings) -> Candidate:
    """A candidate of the project file before its training: prompt, shots and what it retrieves from."""
    own, most = context.of(settings.base), settings.max_tokens
    _refuse_recalled_base(context, own)
    base = own.digest
    if settings.method != "model":
        dataset = context.dataset.digest
        return Candidate(name=name, base=base, max_tokens=most, method=settings.method, dataset=dataset)
    schema = context.project.schema if settings.constrain else None
    lark = context.project.settings.task.lark if settings.constrain else None
    if settings.constrain and schema is None and lark is None:
        raise UsageError(
            "constrain needs a schema, a pattern or a grammar, and the task has none",
            where=f"candidates.{name}.constrain",
            fix="set task.schema, task.pattern or task.grammar",
        )
    retrieve, shots, endpoint = settings.retrieve, settings.wanted_shots, settings.endpoint
    if lark is not None and endpoint is not None:
        raise UsageError(
            "an endpoint holds answers to a JSON Schema only, and the task has a pattern or a grammar",
            where=f"candidates.{name}.constrain",
            fix="leave constrain out for this candidate",
        )
    from_documents = retrieve is not None and retrieve.from_ == "documents"
    # Tuned candidates too: drift monitoring compares requests with their training rows.
    named = shots or settings.adapted or settings.optimise or (retrieve is not None and not from_documents)
    made = Candidate(
        name=name,
        base=base,
        max_tokens=most,
        prompt=read_prompt(context.project.root, name, settings.prompt) if settings.prompt is not None else "",
        retrieve=retrieve,
        answer_schema=None if schema is None else json.dumps(schema, ensure_ascii=False),
        answer_grammar=lark,
        copied=copied_fields(schema, settings.copied, f"candidates.{name}.constrain.copy") if schema else (),
        dataset=context.dataset.digest if named else None,
        documents=context.documents if from_documents else None,
        embedder=context.embedder if retrieve is not None and retrieve.by != "bm25" else None,
        endpoint=None if endpoint is None else RemoteModel(url=endpoint.url, model=endpoint.model),
    )
    if endpoint is None and context.project.settings.server is None:  # servers read schemas in their own ways
        check_constraint(made)
    chosen = choose_shots(context.dataset.examples("train"), shots.count, shots.choose) if shots else []
    made = with_choice(made, made.prompt, chosen)
    if settings.optimise is not None:
        return _optimised(context, made, settings, settings.optimise)
    if settings.prompt_of is not None:
        found = untrained_candidate(context, settings.prompt_of, context.settings_of(settings.prompt_of))
        made = made.model_copy(update={"prompt": found.prompt, "search": found.search})
    return made


def _refuse_recalled_base(context: PipelineContext, own: ProjectBase) -> None:
    """Raise Refused where a candidate's base was recalled, before anything is trained on it or asked of it."""
    with context.store.reading() as session:
        reason = recalled(session, own.digest)
    if reason is not None:
        raise Refused(
            f"the base {own.spec} was recalled: {reason}",
            where="base",
            fix="name another base in tunesmith.yaml",
        )


def _registered(context: PipelineContext, name: str, text: str) -> Candidate:
    """A registered version as a candidate of this name. text: champion, or as `resolve` takes it.

    Raises UsageError where there is none, Refused for one that may not be loaded or was made from another base.
    """
    store, where = context.store, f"candidates.{name}.version"
    try:
        named = f"{context.project.settings.name}@{text}" if text == CHAMPION else text
        version = resolve(store, named, scope=context.scope)
    except UsageError as error:
        fix = f"leave the candidate {name} out until there is one"
        raise UsageError(error.what, where=where, fix=fix) from error
    with store.reading() as session:
        may_load(session, version, context.scope).require(version.label)
    served = load_candidate(store, version.candidate)
    if served.base not in (each.digest for each in context.bases):
        raise Refused(
            f"{version.label} was made from another base, which is not loaded here",
            where=where,
            fix=NextStep(f"leave the candidate {name} out, and compare afterwards", "compare", first=version.label),
        )
    return served.model_copy(update={"name": name})


def read_prompt(root: Path, name: str, file: str) -> str:
    """The text of a candidate's prompt file. Raises UsageError where it is outside the project, cannot be read or is
    empty."""
    where, what = f"candidates.{name}.prompt", f"the prompt of candidate {name}"
    path = inside(root, file, what, where)
    prompt = read_text_file(path, what).strip()
    if not prompt:
        raise UsageError(
            f"the prompt file {path} is empty", where=where, fix="leave prompt out to use each row's own system turn"
        )
    return prompt


def _optimised(
    context: PipelineContext, written: Candidate, settings: CandidateSettings, optimise: Optimise
) -> Candidate:
    """The candidate with the best shots, retrieval and prompt of a search on validation rows."""
    name, endpoint, rewriter = written.name, settings.endpoint, optimise.rewriter
    price = endpoint.price if endpoint is not None else None
    prompts = [written.prompt, *(read_prompt(context.project.root, name, file) for file in optimise.prompts)]
    embedder = context.embedder if settings.retrieve is not None else None
    inputs = {
        "candidate": written.model_dump(mode="json", by_alias=True, exclude={"name"}),
        "prompts": prompts,
        "settings": optimise.model_dump(mode="json", exclude={"rewriter"}),
        "rewriter": rewriter and rewriter.model_dump(mode="json", include={"url", "model", "price"}),
        "price": price and price.model_dump(mode="json"),
        "embedder": embedder,
        "metric": leading_inputs(context),
        "engine": context.engine_of(written),
        **decoding_inputs(context, written),
        **named_documents(written),
    }

    def find(work: Path) -> str:
        held, where = context.without_test_rows(), f"candidates.{name}.optimise"
        train, validation = (held.dataset.examples(split) for split in ("train", "validation"))
        rows, by_leading = tried_rows(validation, optimise, where), leading_scores(held)

        def score(tried: Candidate, some: Sequence[Example], lines: Sequence[Mapping[str, Any]]) -> list[float]:
            # As in the evaluation: with the texts that were retrieved for each row.
            by_id = {line["id"]: line for line in lines}
            return by_leading(seen_answers(held.store, held.dataset, tried, by_id, some), some)

        for asked in filter(None, (endpoint, rewriter)):
            context.progress.say(f"{name}: sending validation rows to {asked.url}")
        with context.progress.task(f"{name}: at most {optimise.calls} answers", optimise.calls) as task:
            asker = Asker(
                settings=optimise,
                price=price,
                answerer=lambda each: answerer(context, each),
                score=score,
                work=work,
                task=task,
                limit=optimise.calls // 2 if rewriter else optimise.calls,
            )
            rewriting = Rewriter(asker, rewriter, f"{where}.rewriter") if rewriter else None
            ended = "choices"
            try:
                choose(asker, written, settings.wanted_shots, prompts, train, rows, embedder)
            except Spent as spent:
                ended = str(spent)
            if rewriting is not None and ended != "cost":
                asker.limit, ended = optimise.calls, "rewrites"
                try:
                    rewriting.rewrite(list(asker.tried.values())[asker.best(len(rows))], rows)
                except Spent as spent:
                    ended = str(spent)
        body = searched(asker, len(rows), ended)
        context.progress.say(f"{name}: {described(body)}")
        return keep_search(held.store, body, asker, written, held.dataset)

    digest = context.stages.run(f"optimise {name}", "search", inputs, find)
    body = SearchBody.read(context.store, digest)
    best = body.tries[body.best]
    by_id = {example.id: example for example in context.dataset.examples("train")}
    chosen = with_choice(written, best.prompt, [by_id[shot] for shot in best.shots])
    by = best.retrieve and best.retrieve.by
    return chosen.model_copy(
        update={"retrieve": best.retrieve, "embedder": None if by in (None, "bm25") else embedder, "search": digest}
    )
