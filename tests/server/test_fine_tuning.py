"""/v1/fine_tuning/jobs: the official client creates, lists and changes jobs; what is not supported is refused."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import openai
import pytest
import yaml
from openai.types.fine_tuning import FineTuningJobEvent

from tests.acting import looking
from tests.fabricate import NAME, OWNER, Scene
from tests.rollout.conftest import begin
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import FakeEngine
from tests.server.fine_tuning_project import MODEL, examples, fine_tuning_settings
from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope, check_name
from tunesmith.jobs import leases, queue
from tunesmith.jobs.fine_tuning import (
    VALIDATING,
    Arguments,
    Hyperparameters,
    Uploaded,
    derived,
    perform_fine_tuning,
    series,
)
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.pipeline.candidates import candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project, parse_settings
from tunesmith.registry.versions import resolve
from tunesmith.services.jobs import add_fine_tuning, find_fine_tuning
from tunesmith.store import uploads
from tunesmith.store.people.tokens import issue_token, revoke_token
from tunesmith.store.tables import FINE_TUNING


def opened(root: Path, **changes: object) -> Project:
    """A project that takes fine-tuning jobs; its folder holds nothing."""
    return Project(root, parse_settings(yaml.safe_dump(fine_tuning_settings(**changes)), "tunesmith.yaml"))


@pytest.fixture
def project(scene: Scene, tmp_path: Path) -> Project:
    found = opened(tmp_path)
    found.store = scene.store
    return found


@pytest.fixture
def tuner(scene: Scene, engine: FakeEngine, project: Project) -> Iterator[Served]:
    with running(scene, engine, project=project) as served:
        yield served


@pytest.fixture
def client(tuner: Served) -> openai.OpenAI:
    return tuner.client(issue_token(tuner.scene.store, OWNER, actor=OWNER))


def streamed(client: openai.OpenAI, job: str, **options: Any) -> openai.Stream[FineTuningJobEvent]:
    """A job's events as they come."""
    options = {"params": {"stream": True}, **options}
    kinds: Any = {"cast_to": FineTuningJobEvent, "stream_cls": openai.Stream[FineTuningJobEvent]}
    return client.get(f"/fine_tuning/jobs/{job}/events", stream=True, options=options, **kinds)


def uploaded(client: openai.OpenAI, data: bytes = b"{}\n") -> str:
    return client.files.create(file=("rows.jsonl", data), purpose="fine-tune").id


def claimed(served: Served) -> Lease:
    lease = leases.claim(served.scene.store, "w", [FINE_TUNING], project="tiny")
    assert lease is not None
    return lease


def test_jobs_are_created_listed_and_changed_as_openais(client: openai.OpenAI, tuner: Served) -> None:
    file, jobs = uploaded(client), client.fine_tuning.jobs
    asked: dict[str, Any] = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    made = jobs.create(
        model=MODEL,
        training_file=file,
        suffix="lamp",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},  # type: ignore[typeddict-item]
    )
    assert (made.object, made.status, made.model, made.training_file) == ("fine_tuning.job", "queued", MODEL, file)
    assert (made.seed, made.metadata, made.result_files, made.fine_tuned_model) == (7, {"team": "a"}, [], None)
    assert made.hyperparameters.to_dict() == asked
    assert made.method is not None
    assert made.method.type == "supervised"
    again = jobs.create(model=MODEL, training_file=file, hyperparameters={"n_epochs": "auto"})
    key = {"Idempotency-Key": "k"}
    third = [jobs.create(model=MODEL, training_file=file, extra_headers=key).id for _ in range(2)]
    assert third[0] == third[1]
    assert [each.id for each in jobs.list(limit=1)] == [third[0], again.id, made.id]
    assert [each.id for each in jobs.list(metadata={"team": "a"})] == [made.id]
    assert [each.id for each in jobs.list(metadata={"team": "b"})] == []
    assert [each.id for each in jobs.list(extra_query={"metadata": "null"})] == [third[0], again.id]
    assert jobs.pause(made.id).status == "paused"  # type: ignore[comparison-overlap]
    assert jobs.resume(made.id).status == "queued"
    cancelled = jobs.cancel(again.id)
    assert (cancelled.status, cancelled.finished_at is not None, cancelled.error) == ("cancelled", True, None)
    with pytest.raises(openai.BadRequestError, match="has ended: cancelled"):
        jobs.cancel(again.id)
    assert [event.message for event in jobs.list_events(made.id, limit=1)] == [
        f"resumed by {OWNER}",
        f"paused, asked by {OWNER}",
    ]
    assert jobs.retrieve(made.id).id == made.id
    assert jobs.checkpoints.list(made.id).data == []
    with pytest.raises(openai.NotFoundError, match="is queued"):
        client.chat.completions.create(model=f"ft:{MODEL}:tiny:lamp:{made.id[6:]}", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model=f"ft:{MODEL}:tiny:other:{made.id[6:]}", messages=HELLO)
    lease = claimed(tuner)
    leases.renew(tuner.scene.store, lease, {"step": VALIDATING})
    assert jobs.retrieve(made.id).status == "validating_files"
    leases.renew(tuner.scene.store, lease, {"step": "training"})
    assert jobs.cancel(made.id).status == "running"  # it ends between two of its steps
    leases.stop(tuner.scene.store, lease, "told to")
    assert jobs.retrieve(made.id).status == "cancelled"


def test_events_come_as_a_stream_that_openai_does_not_have(
    client: openai.OpenAI, tuner: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.server.fine_tuning.jobs.SECONDS", 0.05)
    monkeypatch.setattr("tunesmith.server.fine_tuning.jobs._STREAMS", 2)
    store, create = tuner.scene.store, client.fine_tuning.jobs.create
    job = create(model=MODEL, training_file=uploaded(client)).id
    lease = claimed(tuner)
    with streamed(client, job) as events:
        first = next(events)
        assert first.message == "started by w"
        leases.log(store, lease, "one")
        assert next(events).message == "one"
        leases.finish(store, lease, {})
        assert [event.message for event in events] == ["succeeded"]
    listed = client.fine_tuning.jobs.list_events(job).data[::-1]
    with streamed(client, job) as again, streamed(client, job, headers={"Last-Event-ID": first.id}) as rest:
        assert [each.to_dict() for each in again] == [each.to_dict() for each in listed]
        assert [each.id for each in rest] == [each.id for each in listed[1:]]
    for options, said in (
        ({"params": {"stream": "yes"}}, "true or false"),
        ({"params": {"stream": True, "limit": 3}}, "takes no after and no limit"),
        ({"headers": {"Last-Event-ID": "ftevent-1-99"}}, "There is no event"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            streamed(client, job, **options)
    job = create(model=MODEL, training_file=uploaded(client)).id
    claimed(tuner)
    other = tuner.client(issue_token(store, OWNER, actor=OWNER, name="other"))
    with streamed(client, job) as kept, streamed(other, job) as ending:
        assert next(kept).message == next(ending).message == "started by w"
        with pytest.raises(openai.RateLimitError, match="2 streams of events open"):
            streamed(client, job)
        revoke_token(store, OWNER, "other", actor=OWNER)
        with pytest.raises(openai.APIError, match="revoked"):
            next(ending)
        stopped = threading.Thread(target=tuner.stop)
        stopped.start()
        with pytest.raises(openai.APIError, match="shutting down"):
            next(kept)
        stopped.join()


def test_what_is_refused(client: openai.OpenAI, tuner: Served, served: Served) -> None:
    file = uploaded(client)
    both = {"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}}
    for body, param, said in (
        ({"model": "gpt-9"}, "model", "The model 'gpt-9' does not exist or you do not have access to it."),
        ({"training_file": "file-none"}, "training_file", "invalid training_file: file-none"),
        ({"validation_file": "file-none"}, "validation_file", "invalid validation_file: file-none"),
        ({"validation_file": file}, "validation_file", "must be another file"),
        ({"method": {"type": "dpo"}}, "method", "the method dpo is not supported"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "the integration wandb is not supported"),
        ({"suffix": "a:b"}, "suffix", "Invalid 'suffix'"),
        ({"suffix": "v1..2"}, "suffix", "'tiny-v1..2' is not a version name"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than or equal to 1"),
        ({"hyperparameters": {"learning_rate_multiplier": 1000}}, "hyperparameters", "learning_rate"),
        ({"n_epochs": 3}, "n_epochs", "Unrecognized request argument"),
        (both, None, "give either"),
    ):
        asked = {"model": MODEL, "training_file": file, **body}
        answer = tuner.send("/v1/fine_tuning/jobs", asked, client.api_key)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (404 if param == "model" else 400, param), error
        assert said in error["message"]
    assert client.fine_tuning.jobs.list().data == []
    without = served.client(issue_token(served.scene.store, OWNER, actor=OWNER))  # a project that takes no jobs
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        without.fine_tuning.jobs.create(model=MODEL, training_file=uploaded(without))
    assert without.fine_tuning.jobs.list().data == []


def test_who_may(client: openai.OpenAI, tuner: Served) -> None:
    amy = tuner.client(tuner.person("amy", "engineer", tenant="acme"))
    avi = tuner.client(tuner.person("avi", "approver"))
    owners = client.fine_tuning.jobs.create(model=MODEL, training_file=uploaded(client))
    amys = amy.fine_tuning.jobs.create(model=MODEL, training_file=uploaded(amy))
    assert [each.id for each in amy.fine_tuning.jobs.list()] == [amys.id]
    assert amys.organization_id == "acme"
    for call in (amy.fine_tuning.jobs.retrieve, amy.fine_tuning.jobs.cancel, amy.fine_tuning.jobs.list_events):
        with pytest.raises(openai.NotFoundError, match="Could not find fine tune"):
            call(owners.id)
    gil = tuner.client(tuner.person("gil", "engineer", tenant="globex"))
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        gil.chat.completions.create(model=f"ft:{MODEL}:tiny::{amys.id[6:]}", messages=HELLO)
    # An owner of all tenants trains on a tenant's file: the job, and its model, are the tenant's.
    of_amys = client.fine_tuning.jobs.create(model=MODEL, training_file=amys.training_file)
    assert of_amys.organization_id == "acme"
    with pytest.raises(openai.BadRequestError, match="same tenant"):
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=amys.training_file, validation_file=owners.training_file
        )
    assert avi.fine_tuning.jobs.retrieve(owners.id).status == "queued"
    for change in (avi.fine_tuning.jobs.pause, avi.fine_tuning.jobs.cancel):
        with pytest.raises(openai.PermissionDeniedError):
            change(owners.id)
    with pytest.raises(openai.PermissionDeniedError):
        avi.fine_tuning.jobs.create(model=MODEL, training_file=owners.training_file)


def test_files_that_cannot_be_used_end_the_job(client: openai.OpenAI, tuner: Served, project: Project) -> None:
    few = b"".join(examples().splitlines(True)[:3])
    for data, code, said in (
        (examples()[:200], "invalid_file_format", "The job failed due to an invalid training file. Expected file"),
        (few, "invalid_n_examples", "has 3 example(s), but must have at least 10"),
        (None, "file_deleted", "the file was deleted"),
    ):
        file = uploaded(client, data or b"{}\n")
        made = client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        if data is None:
            client.files.delete(file)
        job = find_fine_tuning(looking(tuner.scene.store, OWNER), made.id)
        assert job is not None
        perform(tuner.scene.store, claimed(tuner), partial(perform_fine_tuning, project, job))
        found = client.fine_tuning.jobs.retrieve(made.id)
        assert found.status == "failed"
        assert found.error is not None
        assert (found.error.code, found.error.param) == (code, "training_file")
        assert said in found.error.message
        assert next(iter(client.fine_tuning.jobs.list_events(made.id))).level == "error"


def test_clients_see_neither_tracebacks_nor_paths(
    client: openai.OpenAI, tuner: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_FIRST_DELAY", 0.0)
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=uploaded(client)).id
    path = "/srv/our big apps/p.txt"
    for error in (
        RuntimeError(f"cannot open '{path}'"),
        UsageError(f"the prompt {path} is empty", where=path, fix="see http://a/b"),
    ):
        with pytest.raises(type(error)):
            perform(tuner.scene.store, claimed(tuner), Mock(side_effect=error))
    sent = [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)]
    assert not any("/srv" in line or "apps" in line for line in sent)
    assert sum(line.startswith("an internal error") for line in sent) == 1
    assert any(line.endswith("RuntimeError: cannot open '...'") for line in sent)
    shown = client.fine_tuning.jobs.retrieve(job).error
    assert shown is not None
    assert shown.message == "the prompt ... is empty\nsee http://a/b"


def test_a_training_tells_its_loss_some_times(scene: Scene) -> None:
    store = scene.store
    lease = leases.begin(store, "w", FINE_TUNING, {}, project="p", actor=OWNER)

    def work(progress: JobProgress) -> Outcome:
        progress.logged = "training"
        with progress.task("training", 500) as task:
            for step in range(500):
                task.note(f"loss {step}")
                task.advance()
        with progress.task("answering", 500) as task:
            task.note("no loss")
        return Outcome({})

    perform(store, lease, work)
    said = [event.message for event in queue.events(store, lease.job)]
    assert said[1] == "Training is 0% done: loss 0"
    assert len(said) == 20 + 2, said
    assert not any("no loss" in line for line in said)


def test_the_clients_values_replace_the_projects(tmp_path: Path) -> None:
    candidates = {"plain": {}, "tuned": {"train": {"budget": "20m", "learning_rate": 0.002}}}
    project = opened(tmp_path, candidates=candidates)
    asked = Hyperparameters(n_epochs=2, batch_size=3, learning_rate_multiplier=0.5)
    arguments = Arguments(settings="", model=MODEL, training_file="f", hyperparameters=asked, seed=9, suffix="My Bot")
    found = derived(project, arguments, Uploaded("/a.jsonl", "a"), Uploaded("/b.jsonl", "b")).settings
    train = found.candidates["tuned"].train
    assert train is not None
    assert (train.epochs, train.batch, train.learning_rate, train.seed, train.budget) == (2, 3, 0.001, 9, 1200)
    assert [(each.path, each.name, each.format, each.split) for each in found.data.sources] == [
        ("/a.jsonl", "a", "openai", None),
        ("/b.jsonl", "b", "openai", "test"),
    ]
    assert (found.name, found.release, found.data.sources[0].licence) == ("tiny-my-bot", "tuned", "CC0-1.0")
    plain = Arguments(settings="", model=MODEL, training_file="f")
    untouched = derived(project, plain, Uploaded("/a.jsonl", "a")).settings
    assert untouched.candidates == project.settings.candidates


def test_each_suffix_has_a_series_of_its_own_with_a_name_that_can_be_registered() -> None:
    long = "y" * 64
    suffixes = ["y" * 58, *(long[:length] for length in range(59, 65)), long[:-1] + "z", None]
    for project in ("tiny", "x" * 63):
        names = [series(project, suffix) for suffix in suffixes]
        assert len(set(names)) == len(suffixes)
        assert [check_name(name, "version name") for name in names] == names
    assert series("tiny", "y" * 58) == f"tiny-{'y' * 58}"
    assert series("tiny", None) == "tiny-ft"


def test_a_candidate_that_is_the_champion_is_the_one_that_serves_the_jobs_tenant(scene: Scene, tmp_path: Path) -> None:
    tuned, acme = {"train": {"rank": 2}}, Scope("acme")
    project = opened(tmp_path, name=NAME, candidates={"old": {"version": "champion"}, "tuned": tuned})
    project.store = scene.store
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}")
    file = uploads.put(scene.store, path, name="r.jsonl", purpose="fine-tune", actor=OWNER, scope=acme).file
    arguments, rows = Arguments(settings="", model=MODEL, training_file=file), Uploaded("/a.jsonl", "a")

    def used(scope: Scope) -> str:
        context = PipelineContext(derived(project, arguments, rows, scope=scope), scope=scope)
        context.bases = [SimpleNamespace(digest=scene.base)]  # type: ignore[list-item]
        version = context.settings_of("old").version
        assert version is not None
        made = scene.store.record(candidate(context, "old"))
        assert made.parents == scene.store.record(resolve(scene.store, version, scope=scope).candidate).parents
        return version

    with pytest.raises(UsageError, match="no champion of home-ft or home to compare with"):
        add_fine_tuning(looking(project, OWNER), arguments)
    begin(scene, resolve(scene.store, f"{NAME}@v1"))
    assert used(acme) == "home@v1"
    begin(scene, scene.version(9, name="home-ft", scope=acme), name="home-ft", scope=acme)
    assert [used(scope) for scope in (acme, Scope("globex"), Scope())] == ["home-ft@v1", "home@v1", "home@v1"]
    assert add_fine_tuning(looking(project, OWNER), arguments).scope == acme


def test_a_name_means_a_base(tmp_path: Path) -> None:
    names = {MODEL: None, "gpt-4.1-nano": "pypi:other==1"}
    tuning = {"models": names, "licence": "CC0-1.0", "split": {"test": 0.4}}
    project = opened(tmp_path, fine_tuning=tuning)
    asked = [Arguments(settings="", model=name, training_file="f") for name in names]
    bases = [derived(project, each, Uploaded("/a.jsonl", "a")).settings.base for each in asked]
    assert bases == [project.settings.base, "pypi:other==1"]
    with pytest.raises(UsageError, match="has no 'gpt-9'"):
        project.on_base("gpt-9")
    servers = {"kind": "vllm", "url": "http://127.0.0.1:1"}
    own = {**tuning, "models": {MODEL: None}}
    opened(tmp_path, fine_tuning=own, engine=servers)
    opened(tmp_path, fine_tuning=tuning, engine={"kind": "vllm", "start": True})
    alone = r"gpt-4\.1-nano: the vLLM servers of engine\.url run this project's base only"
    unsplit = {"models": {MODEL: None}, "licence": "CC0-1.0"}
    for said, wrong in (
        ("write a map", {"fine_tuning": {**tuning, "models": [MODEL]}}),
        (alone, {"fine_tuning": tuning, "engine": servers}),
        ("'template', which rows of OpenAI's clients lack", {"fine_tuning": unsplit}),
        ("name one with", {"candidates": {"a": {"train": {}}, "b": {"train": {}}}}),
    ):
        with pytest.raises(UsageError, match=said):
            opened(tmp_path, **wrong)
    opened(tmp_path, fine_tuning={**own, "split": {"group_by": "template"}})
