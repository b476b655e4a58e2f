"""Exports: loaded by the libraries they are for, equal to what was measured, and refused where they are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import call
from tests.ollama_reader import read_modelfile, render
from tests.tiny_project import SCHEMA, rows, settings, write_project
from tunesmith.api import Project
from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.composing import compose
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import open_engine
from tunesmith.engines.native import export_check
from tunesmith.engines.protocol import Generation
from tunesmith.models.base import open_base
from tunesmith.models.export import merging
from tunesmith.models.rendering import Renderer
from tunesmith.registry.versions import resolve
from tunesmith.store import audit
from tunesmith.store.people import identities
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow

IDS = torch.randint(0, 290, (1, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a version that was approved."""
    folder = tmp_path_factory.mktemp("export") / "p"
    tuned = {
        "prompt": "prompt.txt",
        "train": {"epochs": 1, "rank": 2, "batch": 8, "learning_rate": 0.02},
        "max_tokens": 8,
        "constrain": {"copy": ["room"]},
    }
    write_project(folder, candidates={"plain": settings()["candidates"]["plain"], "tuned": tuned})
    properties = {**SCHEMA["properties"], "room": {"type": "string"}}
    (folder / "schema.json").write_text(json.dumps({**SCHEMA, "properties": properties}))
    project = Project.load(folder)
    assert project.run().document()["register"]["version"] == "tiny@v1"
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    return folder


@pytest.fixture(scope="module")
def approved(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("approved") / "p"
    shutil.copytree(released, copy)
    call(copy, "approve", "tiny@v1", "--as", "ann")
    return copy


ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
MERGED = {"config.json", "generation_config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json",
          "tokenizer_config.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype", "files", "largest"),
    [("peft", None, ADAPTER, 2e-3), ("merged", "fp32", MERGED, 2e-3), ("merged", None, set(), 1.0),
     ("gguf", "fp32", {"model.gguf"}, 2e-3), ("ollama", "fp32", {"model.gguf", "Modelfile"}, 2e-3)],
)  # fmt: skip
def test_an_export_is_compared_recorded_and_shown(
    form: str, dtype: str | None, files: set[str], largest: float, approved: Path, tmp_path: Path
) -> None:
    folder, words = tmp_path / "out", ("--form", form, *(("--dtype", dtype) if dtype else ()))
    given = call(approved, "export", "tiny@v1", str(folder), *words)
    assert given["outcome"] == "pass"
    assert {path.name for path in folder.iterdir()} == set(given["files"])
    assert set(given["files"]) >= files | {"tunesmith.json"}
    for file, facts in given["files"].items():
        assert facts == {"digest": digest_file(folder / file), "bytes": (folder / file).stat().st_size}
        assert (folder / file).stat().st_mode & 0o777 == folder.stat().st_mode & 0o666, "the umask decides who reads it"
    equality = given["equality"]
    assert equality["export"]["max_difference"] < largest
    assert equality["adapter_moves"]["max_difference"] > 10 * equality["export"]["max_difference"]
    assert equality["served"]["max_difference"] < 0.1
    assert equality["engine"] == "native"
    provenance = json.loads((folder / "tunesmith.json").read_text())
    version = call(approved, "show", "tiny@v1")
    assert (provenance["version"], provenance["digest"]) == ("tiny@v1", version["digest"])
    assert (provenance["system"], provenance["copied"]) == ("Answer with JSON.", ["room"])
    assert [" schema: " in given["notes"][0], "copies room from the request" in given["notes"][1]] == [True, True]
    (shown,) = [child for child in version["children"] if child["digest"] == given["export"]]
    assert shown["says"].startswith(f"{given['form']} {given['dtype']}: pass, log-probabilities within ")
    assert exports(Project.load(approved).store)[-1] == given["export"]
    assert call(approved, "verify", "tiny@v1")["ok"]
    for file in files & ADAPTER:
        signed = approved / ".tunesmith" / "versions" / "tiny" / "v1" / file
        assert (folder / file).read_bytes() == signed.read_bytes()
    if form == "ollama":
        _llama_cpp_answers_the_same(approved, folder)
    if form == "merged" and dtype:
        _peft_and_transformers_agree(approved, folder)
        with pytest.raises(UsageError, match="exists already"):
            call(approved, "export", "tiny@v1", str(folder), *words)
        again = call(approved, "export", "tiny@v1", str(tmp_path / "again"), *words)
        assert again["export"] == given["export"]


def _llama_cpp_answers_the_same(approved: Path, folder: Path) -> None:
    """50 requests, asked as Ollama asks: by the Modelfile's template and parameters. Nothing is held to a schema."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel xllamacpp is not installed")
    given = read_modelfile((folder / "Modelfile").read_text())
    parameters, stops = dict(given), [text for name, text in given if name == "stop"]
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx = str((folder / parameters["FROM"]).resolve()), int(parameters["num_ctx"])
    settings.warmup, settings.n_parallel, settings.use_jinja, settings.chat_template = False, 1, False, "chatml"
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    store = Project.load(approved).store
    candidate = load_candidate(store, resolve(store, "tiny@v1").candidate)
    base = open_base(store, candidate.base)
    engine = open_engine(base, Project.load(approved).settings.engine)
    engine.load_adapter("a", approved / ".tunesmith" / "versions" / "tiny" / "v1")
    requests = [[Message.model_validate(row["messages"][0])] for row in rows()[:50]]
    asked = [Generation(compose(candidate, request), max_tokens=candidate.max_tokens) for request in requests]
    ours, renderer = engine.generate(asked, "a"), Renderer(base.folder)

    def post(path: str, **body: object) -> Any:
        return httpx.post(server.listening_address + path, json=body, timeout=60).json()

    limits = {name: float(text) for name, text in given if name in ("temperature", "repeat_penalty")}
    for request, generation, answer in zip(requests, asked, ours, strict=True):
        prompt = render(parameters["TEMPLATE"], request)
        ids = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        assert ids == renderer.prompt(generation.messages)
        theirs = post("/completion", prompt=prompt, n_predict=int(parameters["num_predict"]), stop=stops, **limits)
        assert theirs["content"] == answer.text


@torch.no_grad()
def _peft_and_transformers_agree(approved: Path, merged: Path) -> None:
    signed = approved / ".tunesmith" / "versions" / "tiny" / "v1"

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(approved / "model", dtype=torch.float32)

    by_peft = PeftModel.from_pretrained(base(), str(signed)).merge_and_unload().eval()(IDS).logits
    model = base()
    model.load_adapter(str(signed))
    expected = AutoModelForCausalLM.from_pretrained(merged).eval()(IDS).logits
    assert torch.allclose(by_peft, expected, atol=1e-5)
    assert torch.allclose(model.eval()(IDS).logits, expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "turn on"}], tokenize=False).startswith("<|im_")


def test_what_nobody_approved_or_tuned_is_not_exported(released: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not approved"):
        call(released, "export", "tiny@v1", str(tmp_path / "out"), "--form", "merged")
    with pytest.raises(Refused, match=r"version.export|may not|it takes"):
        call(released, "export", "tiny@v1", str(tmp_path / "out"), "--form", "merged", "--as", "ann")
    assert list(tmp_path.iterdir()) == []
    folder = write_project(tmp_path / "p", candidates={"plain": settings()["candidates"]["plain"]})
    project = Project.load(folder)
    project.run()
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    call(folder, "approve", "tiny@v1", "--as", "ann")
    with pytest.raises(UsageError, match="has no weights to export"):
        call(folder, "export", "tiny@v1", str(tmp_path / "out"), "--form", "merged")


@pytest.mark.parametrize("to", ["nothing", "a folder", "a file", "itself"])
def test_a_link_in_place_of_the_folder_is_not_followed(to: str, approved: Path, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("mine")
    link = tmp_path / "itself"
    link.symlink_to(tmp_path / to)
    before, store = sorted(tmp_path.iterdir()), Project.load(approved).store
    exported = exports(store)
    with pytest.raises(UsageError, match="this is a link, which is not followed"):
        call(approved, "export", "tiny@v1", str(link), "--form", "peft")
    assert sorted(tmp_path.iterdir()) == before
    assert not list((tmp_path / "a folder").iterdir())
    assert exports(store) == exported


@pytest.mark.parametrize("gone", ["ann", "eddy"])
def test_an_export_is_decided_again_at_its_end(
    gone: str, approved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / "p", tmp_path / "out"
    shutil.copytree(approved, copy)
    store = Project.load(copy).store
    owner = identities.acting(store)
    identities.add_user(store, "eddy", ["engineer", "operator"], actor=owner)
    before, real = exports(store), export_check.compare

    def compare(*given: Any, **more: Any) -> Any:
        identities.deactivate(store, gone, actor=owner)
        return real(*given, **more)

    monkeypatch.setattr(export_check, "compare", compare)
    with pytest.raises(Refused, match=gone):
        call(copy, "export", "tiny@v1", str(out / "files"), "--form", "peft", "--as", "eddy")
    assert list(out.iterdir()) == []
    assert exports(store) == before


def exports(store: Store) -> list[str]:
    """The exports in the audit log."""
    with store.reading() as session:
        return [row.detail["record"] for row in audit.entries(session) if row.action == "version.export"]


@pytest.mark.parametrize(("form", "fault"), [("peft", "scale"), ("merged", "lost"), ("gguf", "NaN")])
def test_an_export_that_is_not_what_was_measured_is_refused(
    form: str, fault: str, approved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.Change.apply
    wrong = {
        "scale": lambda self, weight: 1.02 * real(self, weight) - 0.02 * weight.float(),
        "lost": lambda self, weight: weight.float(),
        "NaN": lambda self, weight: real(self, weight) * float("nan"),
    }
    monkeypatch.setattr(merging.Change, "apply", wrong[fault])
    with pytest.raises(Refused, match="the export differs from the adapter as trained") as caught:
        call(approved, "export", "tiny@v1", str(tmp_path / "out"), "--form", form, "--dtype", "fp32")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (record,) = [
        child for child in call(approved, "show", "tiny@v1")["children"] if child["short"] in str(caught.value.where)
    ]
    assert f"{form} fp32: fail" in record["says"], "the figures stay as evidence"
    # Where a missing adapter would not be noticed, the comparison decides nothing.
    monkeypatch.setattr(export_check, "TOLERANCE", {"fp32": {"max": 1e6, "mean": 1e6}})
    with pytest.raises(Inconclusive, match="a missing one would not be noticed"):
        call(approved, "export", "tiny@v1", str(tmp_path / "out"), "--form", form, "--dtype", "fp32")
    assert list(tmp_path.iterdir()) == []
