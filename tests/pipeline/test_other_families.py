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
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import open_engine
from tunesmith.engines.protocol import Question
from tunesmith.models.base import resolve_base
from tunesmith.registry.versions import list_versions
from tunesmith.server.answering.routing import ReadyVersions
from tunesmith.store.people import identities

pytestmark = pytest.mark.slow


def _released(folder: Path, tuned: dict[str, Any], **more: Any) -> tuple[Project, dict[str, Any]]:
    """A project that went the whole way, with an approved version of `tuned` that verifies, answers and was trained."""
    held = settings()["candidates"]["held"]  # type: ignore[index]
    write_project(folder, candidates={"held": held, "tuned": tuned, **more}, release="tuned")
    project = Project.load(folder)
    document = project.run().document()
    assert document["register"]["version"] == "tiny@v1"
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    call(folder, "approve", "tiny@v1", "--as", "ann")
    assert call(folder, "verify", "tiny@v1")["ok"]
    assert call(folder, "chat", "tiny@v1", "-m", "turn on hall fan")
    engine = open_engine(resolve_base(project.store, str(folder / "model"), folder))
    (version,) = list_versions(project.store, "tiny")
    name = ReadyVersions(project.store, engine).answerer(version).adapter
    asked = [Question((Message(role="user", content="turn on hall fan"),), ('{"on":true',))]
    assert engine.choose(asked, name)[0][0] > engine.choose(asked)[0][0] + 0.5, "it was trained on such answers"
    return project, document


def _tuned(**train: Any) -> dict[str, Any]:
    train = {"epochs": 1, "batch": 8, "learning_rate": 0.02, **train}
    return {"prompt": "prompt.txt", "train": train, "max_tokens": 8}


def _engines(project: Project, kind: str) -> set[str]:
    return {project.store.record(digest).body["engine"] for digest in project.store.records_of(kind)}


def test_two_adapters_on_gpt_2_learn_and_are_served_but_not_exported(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write_hf_model(folder / "model", "gpt2")
    project, _ = _released(folder, _tuned(rank=4), named=_tuned(rank=4, targets=["c_attn"]))
    curves = [project.store.record(digest).body["curve"] for digest in project.store.records_of("training")]
    assert len(curves) == 2
    assert all(curve[-1]["loss"] < 0.95 * curve[0]["loss"] for curve in curves)
    assert _engines(project, "training") == _engines(project, "answers") == {"hf"}
    checks = {check["name"]: check for check in call(folder, "doctor")["checks"]}
    assert "gpt2, which is run by transformers' own modules" in checks["base"]["detail"]
    for form in ("peft", "merged", "gguf"):
        with pytest.raises(Refused, match="'gpt2'"):
            call(folder, "export", "tiny@v1", str(tmp_path / "out"), "--as", form)
        assert not (tmp_path / "out").exists()


def test_a_base_trained_in_full_is_evaluated_signed_verified_and_served(tmp_path: Path) -> None:
    """Phi-3, which only transformers runs."""
    folder = tmp_path / "p"
    write_hf_model(folder / "model", "phi3")
    project, document = _released(folder, _tuned(method="full", learning_rate=0.01))
    body = project.store.record(document["train"]["tuned"]["training"]).body
    assert (body["engine"], body["settings"]["method"]) == ("hf", "full")
    version_folder = folder / ".tunesmith" / "versions" / "tiny" / "v1"
    ours, base = (load_file(each / "model.safetensors") for each in (version_folder, folder / "model"))
    assert {name: (w.shape, w.dtype) for name, w in ours.items()} == {n: (w.shape, w.dtype) for n, w in base.items()}
    assert all(not torch.equal(ours[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"quantize": "4bit"}, "needs bitsandbytes, which is not installed"),
        ({"targets": ["q_porj"]}, "no linear layer called 'q_porj'"),
    ],
)
def test_what_hf_cannot_do_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], said: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.engines.hf.support.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    write_hf_model(tmp_path / "p" / "model", "gpt2")
    project = Project.load(write_project(tmp_path / "p", candidates={"tuned": _tuned(**train)}))
    with pytest.raises(TunesmithError, match=said) as error:
        project.run()
    assert str(error.value.where).endswith(f"train.{next(iter(train))}")
    assert not project.store.records_of("dataset")


def test_four_bits_of_a_native_family(tmp_path: Path) -> None:
    """Trained by hf in 4 bits, answered by the native engine in full precision, and released."""
    write_model(tmp_path / "p" / "model", sizes=WIDE)
    project, document = _released(tmp_path / "p", _tuned(rank=2, quantize="4bit", epochs=3))
    body = project.store.record(document["train"]["tuned"]["training"]).body
    assert (body["engine"], body["settings"]["quantize"]) == ("hf", "4bit")
    assert body["environment"]["quantized"].startswith("nf4")
    assert body["final_loss"] < 0.95 * body["curve"][0]["loss"]
    assert _engines(project, "answers") == {"native"}


def test_hf_trains_a_native_family_where_it_is_asked_to(tmp_path: Path) -> None:
    """Trained by hf, answered by the native engine with the same adapter; another engine is another training."""
    losses = {}
    for engine in ("hf", "native"):
        candidates = {"tuned": _tuned(rank=2)}
        project = Project.load(write_project(tmp_path / "p", candidates=candidates, gates={}, engine={"train": engine}))
        body = project.store.record(project.run().document()["train"]["tuned"]["training"]).body
        assert body["engine"] == engine
        losses[engine] = [step["loss"] for step in body["curve"]]
    assert losses["hf"] == pytest.approx(losses["native"], rel=0.02), "the same rows and steps; one base is in bf16"
    assert _engines(project, "answers") == {"native"}
    quantized = {"candidates": {"tuned": _tuned(quantize="4bit")}, "gates": {}, "engine": {"train": "native"}}
    with pytest.raises(Refused, match=r"native engine .* candidates\.tuned\.train\.quantize") as refused:
        Project.load(write_project(tmp_path / "p", **quantized)).run()
    assert refused.value.where == "engine.train"
