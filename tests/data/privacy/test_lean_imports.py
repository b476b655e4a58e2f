"""presidio and spaCy are imported without torch and transformers, which other code still finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import pytest

from tunesmith.data.privacy import lean_imports
from tunesmith.data.privacy.lean_imports import without_torch

SCAN = """
import sys
from tunesmith.data.privacy.entities import Finder
from tunesmith.data.privacy.names import RECOMMENDED
from tunesmith.data.settings import Privacy

text = "Maria Novak moved to Berlin; her IBAN is GB82WEST12345698765432, her number +1 212-456-7890."
(found,) = Finder(Privacy(model=RECOMMENDED)).find([text])
print(sorted({text[each.start : each.end] for each in found}))
print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""
NAME = "hidden_package"
PART = f"{NAME}.part"


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that is hidden in place of torch."""
    (tmp_path / NAME).mkdir()
    for module in ("__init__", "part"):
        (tmp_path / NAME / f"{module}.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lean_imports, "_UNUSED", (NAME,))
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with mock.patch.dict(sys.modules):
        yield


def test_a_scan_with_a_model_of_names_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCAN], capture_output=True, text=True, check=True)
    found, loaded = done.stdout.splitlines()
    for value in ("Maria Novak", "Berlin", "GB82WEST12345698765432", "+1 212-456-7890"):
        assert repr(value) in found
    assert loaded == "[]"


@pytest.mark.usefixtures("hidden")
def test_a_package_is_hidden_from_one_thread_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with without_torch():
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{NAME}'"):
            import_module(NAME)
        with ThreadPoolExecutor(1) as other:
            other.submit(import_module, NAME).result()
    assert import_module(PART)
    with without_torch():
        assert import_module(NAME), "it is loaded already"
    for module in (NAME, PART):
        del sys.modules[module]
    step = EntryPoint("transformer", "spacy_transformers.pipeline_component:make_transformer", "spacy_factories")
    monkeypatch.setattr(lean_imports, "entry_points", lambda group: [step] if group == step.group else [])
    with without_torch():
        assert import_module(NAME), "a package adds steps to spaCy that may need it"
