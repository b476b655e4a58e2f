"""Files of examples that OpenAI refuses are refused in its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats.openai_file import InvalidExamples, check_examples

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EXPECTED = "Expected file to have JSONL format"


def written(folder: Path, *lines: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", f"{EXPECTED}, where every line is a valid JSON dictionary. Line 2: "),
        ('{"a": NaN}', f"{EXPECTED}, where every line is a valid JSON dictionary. Line 2: "),
        ([1], f"{EXPECTED}, where every line is a valid JSON dictionary. Line 2 is not a dictionary."),
        ({"prompt": "a", "completion": "b"}, f"{EXPECTED} with messages key. Missing 'messages' key on line 2."),
        ({"messages": []}, "Invalid file format. Line 2, messages: messages must be a list of at least one message."),
    ],
)
def test_the_first_broken_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(InvalidExamples) as found:
        check_examples(written(tmp_path, GOOD, line, *[GOOD] * 10))
    assert said in found.value.what
    assert found.value.code == "invalid_file_format"


def test_good_files_and_too_few_examples(tmp_path: Path) -> None:
    seen: list[int] = []
    path = written(tmp_path, *[GOOD] * 10, "", {**GOOD, "tools": []})
    assert check_examples(path, on_line=lambda: seen.append(1)) == 11
    assert len(seen) == 12
    assert check_examples(written(tmp_path, GOOD), training=False) == 1
    for rows, training in ((9, True), (0, False)):
        with pytest.raises(InvalidExamples) as found:
            check_examples(written(tmp_path, *[GOOD] * rows), training=training)
        assert found.value.code == "invalid_n_examples"
        if training:
            assert found.value.what == "Training file has 9 example(s), but must have at least 10 examples."
