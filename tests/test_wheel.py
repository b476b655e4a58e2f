"""A wheel built from the tree works in an environment that never saw the clone."""

import json
import os
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.tiny_project import write_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and with the libraries of this environment behind it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python3.*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (site / "libraries.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    source = ROOT / "src"
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [
        name
        for path in (source / "tunesmith").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (name := str(path.relative_to(source))) not in names
    ]
    assert not missing


def test_init_run_and_serve_need_no_clone(python: Path, tmp_path: Path) -> None:
    project = write_project(tmp_path / "p", gates={"valid": {"metric": "json_valid", "at_least": 0.0}})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def tunesmith(*words: str, folder: Path) -> str:
        command = [str(python), "-m", "tunesmith", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import tunesmith; print(tunesmith.__file__)"
    found = subprocess.run([str(python), "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(python.parents[1]))
    new = tmp_path / "new"
    new.mkdir()
    (new / "rows.jsonl").write_text((project / "rows.jsonl").read_text())
    tunesmith("init", "--data", "rows.jsonl", "--licence", "CC0-1.0", "--base", str(project / "model"), folder=new)
    assert json.loads(tunesmith("run", "--json", folder=project))["register"]["version"] == "tiny@v1"
    serving = [str(python), "-m", "tunesmith", "serve", "--port", "0", "--json"]
    with subprocess.Popen(serving, cwd=project, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"].removesuffix("/v1")
            for path in ("/", "/console/static/console.css", "/console/static/htmx.min.js"):
                with urllib.request.urlopen(url + path) as answer:  # noqa: S310 - our own server
                    assert answer.status == 200
                    assert answer.read()
        finally:
            server.terminate()
