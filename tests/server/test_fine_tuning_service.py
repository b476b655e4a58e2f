"""From a file of examples to a model that answers: the official clients against `tunesmith serve` and its workers.

The caller is an engineer of one tenant.
"""

from __future__ import annotations

import csv
import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.commands import Forked
from tests.models.test_rendering_tools import SHORT_CALLS
from tests.own_cache import own_cache
from tests.server.fine_tuning_project import (
    MODEL,
    examples,
    fine_tuning_settings,
    serving,
    token_of_engineer,
    write_fine_tuning_project,
)
from tests.server.test_refused_requests import closed
from tests.tiny import write_model
from tests.waiting import until
from tunesmith.core.scope import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.performing import perform
from tunesmith.project import Project
from tunesmith.services.fine_tuning.arguments import KIND
from tunesmith.services.fine_tuning.perform import perform_fine_tuning

pytestmark = pytest.mark.slow
OTHER_MODEL = "gpt-4.1-nano"
QUESTION: Any = [{"role": "user", "content": "turn on hall fan"}]
SWITCH: Any = {"type": "function", "function": {"name": "switch", "parameters": closed({"on": {"type": "boolean"}})}}


def client_of(url: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=120)


def examples_with_calls() -> bytes:
    """Rows whose answers call the function."""
    found = []
    for row in map(json.loads, examples().splitlines()):
        request, answer = row["messages"]
        function = {"name": "switch", "arguments": answer["content"]}
        calls = [{"id": "a", "type": "function", "function": function}]
        found.append({"messages": [request, {"role": "assistant", "tool_calls": calls}], "tools": [SWITCH]})
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


def test_a_model_on_another_base_that_knows_tools_is_served_by_a_server_of_that_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    monkeypatch.setenv("TUNESMITH_CACHE", own_cache(tmp_path / "cache"))
    folder, settings = tmp_path / "project", fine_tuning_settings()
    tuning: Any = {**settings["fine_tuning"], "models": {MODEL: None, OTHER_MODEL: "other"}}  # type: ignore[dict-item]
    candidates: Any = settings["candidates"]
    candidates["tuned"]["max_tokens"] = 32  # room for a call
    write_fine_tuning_project(folder, fine_tuning=tuning, candidates=candidates)
    write_model(folder / "other", seed=5, template=SHORT_CALLS)
    token, project = token_of_engineer(folder, Scope("acme")), Project.load(folder)
    with serving(folder, "--no-worker") as (url, _):
        client = client_of(url, token)
        file = client.files.create(file=("rows.jsonl", examples_with_calls()), purpose="fine-tune").id
        asked: Any = {"training_file": file, "suffix": "nano", "hyperparameters": {"n_epochs": 1}}
        made = client.fine_tuning.jobs.create(model=OTHER_MODEL, **asked)
        lease = leases.claim(project.store, "w", [KIND], project="tiny")
        assert lease is not None
        perform(project.store, lease, partial(perform_fine_tuning, project, queue.get(project.store, lease.job)))
        done = client.fine_tuning.jobs.retrieve(made.id)
        name: Any = done.fine_tuned_model
        assert (done.status, done.error, name) == ("succeeded", None, f"ft:{OTHER_MODEL}:tiny:nano:{made.id[6:]}")
        said = [event.message for event in client.fine_tuning.jobs.list_events(made.id, limit=3)]  # in pages
        assert said[0] == "succeeded"
        assert any("`tunesmith approve tiny-nano@v1 --tenant acme`" in message for message in said)
        assert f"a server of its base answers: `tunesmith serve --base-of {OTHER_MODEL}`" in said
        rows = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
        assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
        kept = client.fine_tuning.jobs.checkpoints.list(made.id)
        assert [each.fine_tuned_model_checkpoint for each in kept] == [name]
        with pytest.raises(openai.NotFoundError, match="tiny-nano@v1 is not approved"):
            client.chat.completions.create(model=name, messages=QUESTION)
        assert Forked(folder, "approve", "tiny-nano@v1", "--as", "ada", "--tenant", "acme").wait(300) == 0
        with pytest.raises(openai.NotFoundError, match="tiny-nano@v1 was made from another base than this server's"):
            client.chat.completions.create(model=name, messages=QUESTION)
    with serving(folder, "--no-worker", "--base-of", OTHER_MODEL) as (url, _):
        create: Any = client_of(url, token).chat.completions.create
        assert create(model=name, messages=QUESTION).model == "tiny-nano@v1"
        held: Any = {"tools": [SWITCH], "tool_choice": "required", "parallel_tool_calls": False}
        (call,) = create(model=name, messages=QUESTION, **held).choices[0].message.tool_calls
        assert (call.function.name, type(json.loads(call.function.arguments)["on"])) == ("switch", bool)


def test_a_server_starts_a_worker_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails its gates says so, and names the rival that needs no training."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    gate = {"right": {"metric": "exact_match", "at_least": 0.9}}
    folder = write_fine_tuning_project(tmp_path / "project", gates=gate)
    token, store = token_of_engineer(folder), Project.load(folder).store
    with serving(folder) as (url, server):
        client = client_of(url, token)
        file = client.files.create(file=("rows.jsonl", examples()), purpose="fine-tune").id
        made = client.fine_tuning.jobs.create(model=MODEL, training_file=file, hyperparameters={"n_epochs": 1})
        number = int(made.id[6:])
        until(lambda: queue.get(store, number).has_ended)
        done = client.fine_tuning.jobs.retrieve(made.id)
        assert (done.status, done.fine_tuned_model) == ("failed", None)
        assert done.error is not None
        assert done.error.code == "gate_failed"
        assert "right" in done.error.message
        assert "Training did not pay: plain, without training, reaches exact_match" in done.error.message
        assert "verdict sha256:" in done.error.message
        assert client.files.content(done.result_files[0]).text.startswith("step,train_loss")
        with pytest.raises(openai.NotFoundError, match="is failed: gate_failed"):
            client.chat.completions.create(model=f"ft:{MODEL}:tiny::{number}", messages=QUESTION)
        worker = int(queue.get(store, number).worker.rsplit(":", 1)[-1])
        os.kill(worker, 0)
    assert server.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
