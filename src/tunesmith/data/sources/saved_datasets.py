"""Folders that Hugging Face `datasets` wrote with save_to_disk: which of their files hold the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.reading.text_files import read_text_file

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def dataset_files(folder: Path, name: str) -> list[str] | None:
    """Names of the .arrow files of a saved dataset, in order; None for any other folder.

    state.json lists the files and dataset_info.json describes them. Raises UsageError for a folder of several splits
    (name one of them instead) and for a list of files that cannot be followed.
    """
    if (folder / _SPLITS).is_file():
        names = _read(folder / _SPLITS, f"{name}/{_SPLITS}").get("splits")
        listed = names if isinstance(names, list) else []
        raise UsageError(
            f"the folder holds {len(listed)} splits of a dataset: {', '.join(map(str, listed))}",
            where=name,
            fix=f"name one, as {name}/{listed[0] if listed else 'train'}; held-out rows are chosen from what is read",
        )
    if not (folder / _STATE).is_file():
        return None
    where = f"{name}/{_STATE}"
    if not (folder / _INFO).is_file():
        raise UsageError(f"the dataset's folder has no {_INFO}", where=name, fix="save the dataset again")
    state = _read(folder / _STATE, where)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UsageError(
            "the dataset is a selection of rows of another one",
            where=where,
            fix="call flatten_indices() and save it again",
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise UsageError("no files are listed under _data_files", where=where, fix="save the dataset again")
    return [_plain(entry, folder, where) for entry in files]


def _plain(entry: Any, folder: Path, where: str) -> str:
    """A listed file's name. Raises UsageError for a path that leads out of the folder."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".arrow":
        raise UsageError(
            f"{str(name)[:80]!r} is not an .arrow file of this folder", where=where, fix="save the dataset again"
        )
    if not (folder / name).exists():
        raise UsageError(f"{name} is listed but missing", where=where, fix="copy the whole folder")
    return name


def _read(path: Path, where: str) -> JsonObject:
    try:
        value = parse_json(read_text_file(path, "the file"))
    except ValueError as error:
        raise UsageError(f"cannot be read: {error}", where=where, fix="save the dataset again") from error
    if not isinstance(value, dict):
        raise UsageError("is not a JSON object", where=where, fix="save the dataset again")
    return value
