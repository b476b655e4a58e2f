"""The whole pipeline with the hf engine: on a base of another family, and on one of a native family."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import call
from tests.hf_models import write_hf_model
from tests.tiny import WIDE, write_model
from tests.tiny_project import settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import open_engine
from tunesmith.engines.protocol import Question
from tunesmith.models.base import resolve_base
from tunesmith.registry.versions import list_versions
from tunesmith.server.answering.routing import ReadyVersions
from tunesmith.store.people import identities

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an approved version on a tiny GPT-2; two adapters are trained, one after another."""
    folder = tmp_path_factory.mktemp("other-family") / "p"
    write_hf_model(folder / "model", "gpt2")
    given: dict[str, Any] = settings()["candidates"]  # type: ignore[assignment]
    train = {"epochs": 1, "rank": 4, "batch": 8, "learning_rate": 0.02}
    tuned = {"prompt": "prompt.txt", "train": train, "max_tokens": 8}
    named = {"prompt": "prompt.txt", "train": {**train, "targets": ["c_attn"]}, "max_tokens": 8}
    write_project(folder, candidates={"held": given["held"], "tuned": tuned, "named": named}, release="tuned")
    project = Project.load(folder)
    assert project.run().document()["register"]["version"] == "tiny@v1"
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    call(folder, "approve", "tiny@v1", "--as", "ann")
    return folder


def test_it_learns_and_records_name_the_engine(released: Path) -> None:
    store = Project.load(released).store
    trainings = [store.record(digest).body for digest in store.records_of("training")]
    assert len(trainings) == 2
    for body in trainings:
        assert body["engine"] == "hf"
        assert body["curve"][-1]["loss"] < 0.95 * body["curve"][0]["loss"]
    answers = [store.record(digest).body for digest in store.records_of("answers")]
    assert {body["engine"] for body in answers} == {"hf"}


def test_the_version_verifies_and_answers(released: Path) -> None:
    assert call(released, "verify", "tiny@v1")["ok"]
    assert call(released, "chat", "tiny@v1", "-m", "turn on hall fan")
    project = Project.load(released)
    base = resolve_base(project.store, str(released / "model"), released)
    engine = open_engine(base)
    (version,) = list_versions(project.store, "tiny")
    name = ReadyVersions(project.store, engine).answerer(version).adapter
    asked = [Question((Message(role="user", content="turn on hall fan"),), ('{"on":true',))]
    assert engine.choose(asked, name)[0][0] > engine.choose(asked)[0][0] + 0.5, "it was trained on such answers"
    checks = {check["name"]: check for check in call(released, "doctor")["checks"]}
    assert "gpt2, which is run by transformers' own modules" in checks["base"]["detail"]


@pytest.mark.parametrize("form", ["peft", "merged", "gguf"])
def test_it_is_not_exported(released: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(Refused, match="'gpt2'"):
        call(released, "export", "tiny@v1", str(tmp_path / "out"), "--as", form)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_layer_is_refused_before_any_work(tmp_path: Path) -> None:
    train = {"prompt": "prompt.txt", "train": {"targets": ["q_porj"]}, "max_tokens": 8}
    folder = write_project(tmp_path / "p", candidates={"tuned": train})
    with pytest.raises(UsageError, match="no linear layer called 'q_porj'"):
        Project.load(folder).run()
    assert not Project.load(folder).store.records_of("dataset")


def test_a_base_trained_in_full_is_evaluated_signed_verified_and_served(tmp_path: Path) -> None:
    """Phi-3, which only transformers runs."""
    write_hf_model(tmp_path / "p" / "model", "phi3")
    train = {"method": "full", "epochs": 1, "batch": 8, "learning_rate": 0.01}
    tuned = {"prompt": "prompt.txt", "train": train, "max_tokens": 8}
    held = settings()["candidates"]["held"]  # type: ignore[index]
    folder = write_project(tmp_path / "p", candidates={"held": held, "tuned": tuned}, release="tuned")
    project = Project.load(folder)
    document = project.run().document()
    assert document["register"]["version"] == "tiny@v1"
    body = project.store.record(document["train"]["tuned"]["training"]).body
    assert (body["engine"], body["settings"]["method"]) == ("hf", "full")
    version_folder = folder / ".tunesmith" / "versions" / "tiny" / "v1"
    ours, base = (load_file(each / "model.safetensors") for each in (version_folder, folder / "model"))
    assert {name: (w.shape, w.dtype) for name, w in ours.items()} == {n: (w.shape, w.dtype) for n, w in base.items()}
    assert all(not torch.equal(ours[name], base[name]) for name in base)
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    call(folder, "approve", "tiny@v1", "--as", "ann")
    assert call(folder, "verify", "tiny@v1")["ok"]
    assert call(folder, "chat", "tiny@v1", "-m", "turn on hall fan")
    engine = open_engine(resolve_base(project.store, str(folder / "model"), folder))
    (version,) = list_versions(project.store, "tiny")
    name = ReadyVersions(project.store, engine).answerer(version).adapter
    asked = [Question((Message(role="user", content="turn on hall fan"),), ('{"on":true',))]
    assert engine.choose(asked, name)[0][0] > engine.choose(asked)[0][0] + 0.5, "it was trained on such answers"


def test_what_hf_cannot_do_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.engines.hf.support.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    write_hf_model(tmp_path / "p" / "model", "gpt2")
    candidates = {"tuned": {"prompt": "prompt.txt", "train": {"quantize": "4bit"}, "max_tokens": 8}}
    project = Project.load(write_project(tmp_path / "p", candidates=candidates))
    with pytest.raises(TunesmithError, match="needs bitsandbytes, which is not installed") as error:
        project.run()
    assert error.value.where == "candidates.tuned.train.quantize"
    assert not project.store.records_of("dataset")


def test_four_bits_of_a_native_family(tmp_path: Path) -> None:
    """Trained by hf in 4 bits, answered by the native engine in full precision, and released."""
    write_model(tmp_path / "p" / "model", sizes=WIDE)
    train = {"rank": 2, "batch": 8, "quantize": "4bit", "learning_rate": 0.02}
    tuned = {"prompt": "prompt.txt", "train": train, "max_tokens": 8}
    held = settings()["candidates"]["held"]  # type: ignore[index]
    folder = write_project(tmp_path / "p", candidates={"held": held, "tuned": tuned}, release="tuned")
    project = Project.load(folder)
    document = project.run().document()
    body = project.store.record(document["train"]["tuned"]["training"]).body
    assert body["settings"]["quantize"] == "4bit"
    assert body["engine"] == "hf"
    assert body["environment"]["quantized"].startswith("nf4")
    assert body["final_loss"] < 0.95 * body["curve"][0]["loss"]
    assert document["register"]["version"] == "tiny@v1"
    answers = [project.store.record(digest).body for digest in project.store.records_of("answers")]
    assert {answer["engine"] for answer in answers} == {"native"}


def test_hf_trains_a_native_family_where_it_is_asked_to(tmp_path: Path) -> None:
    """Trained by hf, answered by the native engine with the same adapter; another engine is another training."""
    train = {"rank": 2, "batch": 8, "learning_rate": 0.02, "epochs": 1}
    tuned = {"prompt": "prompt.txt", "train": train, "max_tokens": 8}
    found = {}
    for engine in ("hf", "native"):
        folder = write_project(tmp_path / "p", candidates={"tuned": tuned}, gates={}, engine={"train": engine})
        project = Project.load(folder)
        training = project.run().document()["train"]["tuned"]["training"]
        found[engine] = project.store.record(training).body
    assert {name: body["engine"] for name, body in found.items()} == {"hf": "hf", "native": "native"}
    losses = {name: [step["loss"] for step in body["curve"]] for name, body in found.items()}
    assert losses["hf"] == pytest.approx(losses["native"], rel=0.02), "the same rows and steps; one base is in bf16"
    answers = [project.store.record(digest).body for digest in project.store.records_of("answers")]
    assert {answer["engine"] for answer in answers} == {"native"}
    write_project(tmp_path / "p", candidates={"tuned": {**tuned, "train": {**train, "quantize": "4bit"}}},
                  gates={}, engine={"train": "native"})  # fmt: skip
    with pytest.raises(Refused, match=r"native engine .* candidates\.tuned\.train\.quantize") as refused:
        Project.load(folder).run()
    assert refused.value.where == "engine.train"
