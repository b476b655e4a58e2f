"""Models trained in full, and bases that the hf engine runs, go the whole way: trained, judged, registered, served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.commands import call
from tests.hf_models import write_hf_model
from tests.tiny import WIDE, write_model
from tests.tiny_project import settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import open_engine
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Question
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.weight_files import check_model_file
from tunesmith.registry.versions import list_versions
from tunesmith.server.answering.routing import ReadyVersions
from tunesmith.store.people import identities

pytestmark = pytest.mark.slow

WHOLE = "model.safetensors"
ASKED = Question((Message(role="user", content="turn on hall fan"),), ('{"on":true',))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an approved version of a model that was trained in full."""
    return _released(tmp_path_factory.mktemp("full") / "p", _tuned(method="full", learning_rate=0.01))[0].root


def _version_folder(project: Path) -> Path:
    return project / ".tunesmith" / "versions" / "tiny" / "v1"


def _base(project: Path) -> Base:
    return resolve_base(Project.load(project).store, str(project / "model"), project)


def test_the_version_holds_the_bases_tensors_and_verifies(released: Path) -> None:
    files = {path.name for path in _version_folder(released).iterdir()}
    assert files >= {WHOLE, "release.json", "model.sig"}
    assert not any("adapter" in name for name in files)
    ours, base = load_file(_version_folder(released) / WHOLE), load_file(released / "model" / WHOLE)
    assert {name: (w.shape, w.dtype) for name, w in ours.items()} == {n: (w.shape, w.dtype) for n, w in base.items()}
    assert all(not torch.equal(ours[name], base[name]) for name in base)
    store = Project.load(released).store
    (training,) = store.records_of("training")
    stated = store.record(training).body["settings"]
    assert stated["method"] == "full"
    assert "rank" not in stated


def test_the_engine_swaps_adapters_and_reads_them_again(released: Path) -> None:
    engine, folder = NativeEngine(_base(released)), _version_folder(released)
    engine.load_adapter("full", folder)
    plain, tuned = engine.choose([ASKED])[0][0], engine.choose([ASKED], "full")[0][0]
    assert tuned > plain + 0.1, "it was trained on such answers"
    store = Project.load(released).store
    (version,) = list_versions(store, "tiny")
    ready = ReadyVersions(store, engine)
    name = str(ready.answerer(version).candidate.training)
    for other in ("b", "c", "d"):
        engine.load_adapter(other, folder)
    assert (engine.holds("full"), engine.holds(name), engine.holds("d")) == (False, False, True)
    assert engine.choose([ASKED], "d")[0][0] == tuned
    with pytest.raises(Refused, match="not loaded"):
        engine.choose([ASKED], "full")
    ready.answerer(version)
    assert engine.choose([ASKED], name)[0][0] == tuned


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_it_is_exported_as_a_model_that_transformers_loads(released: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(UsageError, match="trained in full: there is no adapter"):
        call(released, "export", "tiny@v1", str(tmp_path / "out"), "--form", "peft")
    assert not (tmp_path / "out").exists()
    given = call(released, "export", "tiny@v1", str(tmp_path / "out"), "--form", form, "--dtype", "fp32")
    assert given["outcome"] == "pass"
    assert given["equality"]["export"]["max_difference"] < 2e-3
    if form == "merged":
        state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        ours = load_file(_version_folder(released) / WHOLE)
        assert all(torch.equal(state[name], weight) for name, weight in ours.items())


def _bound(of: Base, **changes: str) -> dict[str, str]:
    return {"tunesmith": json.dumps({"base": of.digest, "fingerprint": of.fingerprint} | changes)}


def test_weights_that_are_not_the_bases_are_refused(released: Path, tmp_path: Path) -> None:
    base = _base(released)
    engine, weights = NativeEngine(base), load_file(_version_folder(released) / WHOLE)
    name, foreign = "model.layers.0.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        (weights, _bound(base, base="sha256:0"), "another base"),
        ({**weights, name: weights[name][:-1].clone()}, _bound(base), r"float32 \[47, 32\], but the base's is"),
        ({**weights, name: weights[name].bfloat16()}, _bound(base), "is bfloat16"),
        ({**weights, foreign: weights[name].clone()}, _bound(base), "the base does not have"),
        ({key: weight for key, weight in weights.items() if key != name}, _bound(base), f"lack {name}"),
        (load_file(base.folder / WHOLE), _bound(base), "the weights equal the base's"),
    ]
    for tensors, metadata, reason in cases:
        save_file(tensors, tmp_path / WHOLE, metadata=metadata)
        with pytest.raises(Refused, match=reason):
            engine.load_adapter("x", tmp_path)
    assert not engine.holds("x")


def test_what_is_no_plain_weight_of_this_base_is_not_signed(released: Path, tmp_path: Path) -> None:
    base = _base(released)
    name, path = "model.norm.weight", tmp_path / WHOLE
    good = {name: torch.ones(3)}

    def check(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        check_model_file(tmp_path, base=base.digest, fingerprint=base.fingerprint)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check({name: torch.tensor([1.0, -3e4, 0.0], dtype=dtype)}, _bound(base))
        for bad in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(Refused, match="NaN or an infinity"):
                check({name: torch.tensor([1.0, bad], dtype=dtype)}, _bound(base))
    refused = [
        (good, {**_bound(base), "format": "pt"}, "unknown key"),
        (good, {}, "does not say which base"),
        (good, _bound(base, base="sha256:0"), "another base"),
        (good, _bound(base, fingerprint="x"), "another tokenizer"),
        ({"model.norm.weight": torch.ones(3, dtype=torch.int32)}, _bound(base), "is I32"),
        ({"lm_head.lora_A.weight": torch.ones(3, 3)}, _bound(base), "not a weight of a model"),
        ({name: torch.ones(1, 1, 1, 1, 3)}, _bound(base), "shape"),
        ({}, _bound(base), "no tensor"),
    ]
    for tensors, metadata, reason in refused:
        with pytest.raises(Refused, match=reason):
            check(tensors, metadata)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(Refused, match="not readable as safetensors"):
        check_model_file(tmp_path, base=base.digest, fingerprint=base.fingerprint)


# The whole pipeline with the hf engine: on a base of another family, and on one of a native family


def _released(folder: Path, tuned: dict[str, Any], **more: Any) -> tuple[Project, dict[str, Any]]:
    """A project that went the whole way, with an approved version of `tuned` that verifies, answers and was trained."""
    held = settings()["candidates"]["held"]
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
    name = ReadyVersions(project.store, engine).answerer(version).candidate.training
    assert engine.choose([ASKED], name)[0][0] > engine.choose([ASKED])[0][0] + 0.5, "it was trained on such answers"
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
            call(folder, "export", "tiny@v1", str(tmp_path / "out"), "--form", form)
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path: Path) -> None:
    project = Project.load(write_project(tmp_path / "p", candidates={"tuned": _tuned(targets=["q_porj"])}))
    with pytest.raises(TunesmithError, match="no linear layer called 'q_porj'") as error:
        project.run()
    assert str(error.value.where).endswith("train.targets")
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
