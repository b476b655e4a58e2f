"""presidio and spaCy are imported without torch and transformers, which other code still finds."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import EntryPoint

import pytest

from tunesmith.data.privacy import names
from tunesmith.data.privacy.names import without_torch

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


def test_a_scan_with_a_model_of_names_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCAN], capture_output=True, text=True, check=True)
    found, loaded = done.stdout.splitlines()
    assert all(repr(value) in found for value in ("Maria Novak", "Berlin", "GB82WEST12345698765432"))
    assert loaded == "[]"


def test_a_package_is_hidden_from_one_thread_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    name, part = "pydoc_data", "pydoc_data.topics"  # in place of torch
    for module in (name, part, "transformers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(names, "_HEAVY", (name,))
    with without_torch():
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            import_module(name)
        with ThreadPoolExecutor(1) as other:
            other.submit(import_module, name).result()
    assert import_module(part)
    with without_torch():
        assert import_module(name), "it is loaded already"
    for module in (name, part):
        del sys.modules[module]
    step = EntryPoint("transformer", "spacy_transformers.pipeline_component:make_transformer", "spacy_factories")
    monkeypatch.setattr(names, "entry_points", lambda group: [step])
    with without_torch():
        assert import_module(name), "a package adds steps to spaCy that may need it"
