"""The tutorial's commands work. In a module of its own, so that it runs beside the README's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_pages import check_commands

pytestmark = pytest.mark.slow


def test_commands_of_the_tutorial_work(tmp_path: Path) -> None:
    check_commands("docs/tutorial.md", tmp_path)
