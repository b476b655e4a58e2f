"""Finds rows with tokens by which the base's chat template marks turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Progress
from tunesmith.data.building.examine import control_token

# What control tokens look like in every known family: <|im_end|>, </s>, <start_of_turn>, [INST].
_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")


class ControlTokens:
    """The control tokens of a base. root: where the path of a local one starts.

    Its tokenizer is loaded, and downloaded where needed, for the first row that may hold one. unknown: why that failed.
    """

    unknown: str | None = None

    def __init__(self, base: str, root: Path, progress: Progress) -> None:
        self._base, self._root, self._progress = base, root, progress

    def reason(self, messages: Sequence[Message]) -> str | None:
        """Why `data build` removes or refuses a row; None for a row without control tokens."""
        if not any(_MARK.search(text) for turn in messages for text in turn.shown_texts()):
            return None
        return control_token(messages, self._tokens)

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        from tunesmith.models.base import tokenizer_folder
        from tunesmith.models.rendering import Renderer

        try:
            return Renderer(tokenizer_folder(self._base, self._root, self._progress)).control_tokens
        except (TunesmithError, OSError, ValueError) as error:  # a base may be made or downloaded later
            self.unknown = str(error).partition("\n")[0]
            return ()
