"""`tunesmith serve` as its users run it: a process, the embedded engine on a tiny model, the official client."""

import inspect
import json
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from tests.commands import Forked, first_line, started
from tests.fabricate import NAME, OPERATOR, OWNER, build_scene
from tests.own_cache import own_cache
from tests.tiny import TEMPLATE, write_model
from tunesmith.cli import serve as cli_serve
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.rollout.commands import start
from tunesmith.rollout.settings import DEFAULT_STEPS
from tunesmith.server.limits import ServerSettings
from tunesmith.store.people.tokens import issue_token

pytestmark = pytest.mark.slow

SERVE = ("serve", "--json", "--no-worker")
OTHER = TEMPLATE.replace("<|im_start|>", "<|im_start|>\n", 1)
PROJECT = f"""
name: {NAME}
base: ./model
data: {{sources: [{{path: rows.jsonl, licence: Apache-2.0}}]}}
candidates: {{plain: {{prompt: prompt.txt}}, other: {{base: ./other, prompt: prompt.txt}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two champions; each answers with a base of its own alone."""
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setenv("TUNESMITH_CACHE", own_cache(tmp_path / "cache"))
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", "qwen2", template=OTHER)
    (tmp_path / "tunesmith.yaml").write_text(PROJECT)
    first, second = (each.digest for each in PipelineContext(Project.load(tmp_path)).bases)
    scene = build_scene(tmp_path / ".tunesmith", base=first)
    for name, version in (
        (NAME, scene.version(None)),
        ("other", replace(scene, base=second).version(None, name="other")),
    ):
        start(scene.store, name=name, version=version, steps=DEFAULT_STEPS, actor=OPERATOR)
    (tmp_path / "token").write_text(issue_token(scene.store, OPERATOR, actor=OPERATOR))
    scene.store.engine.dispose()
    return tmp_path


def command(folder: Path, *options: str) -> Forked:
    return Forked(folder, *SERVE, *options)


def test_a_project_is_served_until_it_is_told_to_stop(folder: Path) -> None:
    process = started(folder, *SERVE, "--port", "0", stdout=subprocess.PIPE)
    try:
        document = first_line(process)
        assert document["models"] == [f"{NAME}@champion", "other@champion"]
        assert document["url"].startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=document["url"], api_key=(folder / "token").read_text(), timeout=120)
        asked = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        pieces = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        assert whole.model == f"{NAME}@v1"
        assert 0 < whole.usage.completion_tokens <= 8
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
        other = client.chat.completions.create(**{**asked, "model": "other"})  # type: ignore[call-overload]
        assert other.model == "other@v1"
        assert other.choices[0].message.content != whole.choices[0].message.content
        assert other.usage.prompt_tokens == whole.usage.prompt_tokens + 2, "its own template writes a line more a turn"
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_a_usage_error(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = command(folder, "--port", str(taken.getsockname()[1]))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "cannot listen there" in json.loads(out)["error"]["what"]
    assert "choose another --port" in err


def test_defaults_of_options_are_those_of_the_settings() -> None:
    """They are written twice, so that the command line starts without pydantic."""
    options = inspect.signature(cli_serve.serve).parameters
    for option, setting in (
        ("grace", "grace_seconds"),
        ("per_user", "per_user"),
        ("unread", "unread_seconds"),
        ("idle_connections", "idle_connections"),
    ):
        assert options[option].default == ServerSettings.model_fields[setting].default
    assert options["largest_file"].default << 20 == ServerSettings.model_fields["file_bytes"].default
