"""Keeps requests as cases where their callers asked for it: scanned for personal data, and for a limited time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from tunesmith.core.clock import iso
from tunesmith.core.messages import Message
from tunesmith.core.values import Schema
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.settings import ENTITIES, Privacy
from tunesmith.monitoring.cases import count_cases
from tunesmith.monitoring.settings import CaseSettings
from tunesmith.store.store import Store

_LONGEST = 65_536  # characters of a case as JSON: the scan of so many takes seconds at worst


class NotKept(Exception):
    """Why a request does not become a case. The text says no word of the request."""


class CaseTexts(NamedTuple):
    """The texts of a case after the scan. answer: None where the request failed; expected: None where nobody said."""

    messages: tuple[Message, ...]
    answer: str | None
    expected: str | None


class CaseKeeper:
    """Prepares texts for keeping. Thread-safe.

    privacy: the project's. Identifiers and secrets are looked for even where its `entities` leave them out, and what is
    found is replaced by pseudonyms, or the request is not kept where rows like it would not be. schema: of the task's
    answers; the values that it lists are no personal data.
    """

    def __init__(self, store: Store, settings: CaseSettings, privacy: Privacy, schema: Schema | None = None) -> None:
        self._store, self._settings, self._schema = store, settings, schema
        wanted = None if privacy.entities is None else tuple(dict.fromkeys((*privacy.entities, *ENTITIES)))
        self._privacy = privacy.model_copy(update={"entities": wanted})
        self._scanner: Scanner | None = None
        self._loading = threading.Lock()

    def until(self, at: str) -> str:
        """When a case of a request that came at a time is deleted."""
        return iso(datetime.fromisoformat(at) + timedelta(days=self._settings.days))

    def scanned(self, messages: Sequence[Message], answer: str | None, expected: str | None) -> CaseTexts:
        """The texts with pseudonyms for personal data and secrets. Raises NotKept."""
        given = [text for text in (answer, expected) if text is not None]
        whole = [*messages, *(Message(role="assistant", content=text) for text in given)]
        if sum(len(turn.model_dump_json()) for turn in whole) > _LONGEST:  # calls and tools too
            raise NotKept(f"it is longer than {_LONGEST:,} characters")
        if count_cases(self._store) >= self._settings.at_most:
            raise NotKept(f"{self._settings.at_most:,} requests wait for a review, and no more are kept")
        scan = self._scan(whole)
        if scan.counts and self._privacy.action in ("remove", "refuse"):
            raise NotKept(f"it holds {', '.join(sorted(scan.counts))}, and this project keeps no such text")
        if scan.messages is None:
            raise NotKept("personal data in it cannot be replaced")
        texts = [turn.content for turn in scan.messages[len(messages) :]]
        return CaseTexts(
            messages=scan.messages[: len(messages)],
            answer=None if answer is None else texts[0],
            expected=None if expected is None else texts[-1],
        )

    def _scan(self, messages: Sequence[Message]) -> Scan:
        with self._loading:
            if self._scanner is None:  # on first use: its patterns take a second to load
                self._scanner = Scanner(self._privacy, self._schema)
        return self._scanner.scan(messages)
