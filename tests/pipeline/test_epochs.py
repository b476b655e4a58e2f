"""How often a training reads its rows, where the project leaves it open."""

import json
from pathlib import Path

import pytest

from tests.models.test_rendering_tools import HERMES
from tests.tiny_project import rows, write_project
from tunesmith.pipeline.candidates import untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import fitted
from tunesmith.project import Project
from tunesmith.training.settings import TrainSettings

TOOLS = [{"type": "function", "function": {"name": "switch", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(("every", "epochs"), [(1, 5), (3, 20)])
def test_rows_with_tools_are_read_five_times_at_most(tmp_path: Path, every: int, epochs: int) -> None:
    folder = write_project(tmp_path)
    (folder / "model" / "chat_template.jinja").write_text(HERMES)
    found = [{**row, **({"tools": TOOLS} if place % every == 0 else {})} for place, row in enumerate(rows())]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    context = PipelineContext(Project.load(folder))
    plain = untrained_candidate(context, "plain", context.project.settings.candidates["plain"])
    many_canaries = TrainSettings.model_validate({"canaries": {"each": 50}})
    assert fitted(context, plain, TrainSettings()).epochs == fitted(context, plain, many_canaries).epochs == epochs
