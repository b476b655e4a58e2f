"""Export: a released version's weights as files for other programs, compared with what was measured.

The files are written to a temporary folder and compared there with the adapter as trained and as served. Only files
that agree get their final name, once the audit log has the export. The figures are kept as a record of the kind
`export`, also if they disagree.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import compose
from tunesmith.core.digests import digest_file, short
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Progress
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import require_new, room_for, sync_folder
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.engines.factory import export_check
from tunesmith.engines.settings import is_native
from tunesmith.models.base import Base, is_folder
from tunesmith.models.weight_files import CONFIG_FILE
from tunesmith.records.candidate import StoredFile
from tunesmith.records.evaluation import Outcome
from tunesmith.records.version import Dtype, Equality, ExportBody, Form, Tolerance
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import Verified, verified_copy
from tunesmith.registry.signing.release import ADAPTER_FILES, Version
from tunesmith.registry.signing.signatures import sync_files
from tunesmith.store.people import identities
from tunesmith.store.store import Store

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Engine

PROVENANCE = "tunesmith.json"
_PROBES = 16  # held-out requests that are compared
_RENDERED = 200  # of which Ollama's template is compared
_PROBE_TOKENS = 48  # most tokens of an answer that is compared
_FIX = "keep the record as evidence; nothing was exported"
_AS_GGUF = "export it as gguf, and retrieve in the program that asks"


class Exported(NamedTuple):
    """A finished export. record: digest of the export record. folder: where the files are. notes: what Ollama does
    otherwise."""

    record: str
    folder: Path
    body: ExportBody
    notes: tuple[str, ...]


def export_version(
    store: Store,
    version: Version,
    target: Path,
    *,
    form: Form,
    dtype: Dtype,
    base: Base,
    engine: Engine,
    engine_kind: str,
    actor: str,
    progress: Progress,
) -> Exported:
    """Write an approved version's weights into target, a folder that must not exist yet.

    form: peft, the adapter's files as they were signed; merged, a complete Hugging Face folder; gguf, one file for
    llama.cpp; ollama, such a file and a Modelfile. dtype: of merged weights. engine: the one that serves, with the
    version's base. Raises Refused if the version is not approved, if its family or chat template cannot be exported, or
    if a log-probability differs by more than the tolerance; Inconclusive if the adapter changes less than that, so
    that a missing one would not be noticed.
    """
    identities.require(store, actor, "version.export", scope=version.scope)
    verified: Verified = {}
    with store.reading() as session:
        check_may_serve(session, store, version, version.scope, verified=verified)
    if not is_native(base.family):
        raise Refused(
            f"{version.label} has a base of family {base.family!r}, which the native engine does not compute: its "
            "export could not be compared",
            where=version.label,
            fix="use the adapter in the version's folder: it is in PEFT's layout and verified",
        )
    require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with verified_copy(store, version) as loaded, _aside(store, target) as folder:
        candidate, adapter = loaded.candidate, loaded.adapter
        if adapter is None or candidate.training is None:
            raise UsageError(
                f"{version.label} answers with the base model and has no weights to export",
                where=version.label,
                fix="use the base model itself",
            )
        if candidate.base != base.digest or engine.base != base.digest:
            raise UsageError(f"{version.label} has another base than the engine", where=version.label)
        notes = _write_modelfile(store, candidate, base, folder) if form == "ollama" else ()
        _write(form, dtype, base, adapter, folder, version)
        dtype = "fp32" if form == "peft" else dtype
        provenance = _provenance(version, candidate, base, form, dtype)
        (folder / PROVENANCE).write_bytes(json.dumps(provenance, indent=2, ensure_ascii=False).encode() + b"\n")
        check, probes, length = export_check(), _probes(store, candidate), min(candidate.max_tokens, _PROBE_TOKENS)
        engine.load_adapter(candidate.training, adapter)
        answered = check.answer_probes(engine, candidate.training, base, probes, length, progress)
        equality: Equality = check.compare(
            engine, candidate.training, kind=engine_kind, base=base, trained=adapter, form=form, exported=folder,
            answered=answered, progress=progress,
        )  # fmt: skip
        tolerance = Tolerance(export=dict(check.TOLERANCE[dtype]), served={"max": check.SERVED_TOLERANCE})
        outcome, reason = _judge(equality, tolerance)
        body = ExportBody(
            form=form,
            dtype=dtype,
            files={
                path.relative_to(folder).as_posix(): StoredFile(digest=digest_file(path), bytes=path.stat().st_size)
                for path in _files(folder)
            },
            equality=equality,
            tolerance=tolerance,
            outcome=outcome,
            reason=reason,
        )
        record = body.record({"version": version.digest})
        if outcome != "pass":
            store.put_record(record)
            kind = Refused if outcome == "fail" else Inconclusive
            raise kind(reason, where=f"export record {short(record.digest)}", fix=_FIX)
        for path in _files(folder):  # the writers' libraries make private files; the umask decides
            path.chmod(folder.stat().st_mode & 0o666)
        sync_files(folder)
        detail = {"version": version.label, "form": form, "record": record.digest, "files": record.body["files"]}
        with store.change(actor, "version.export", version.digest, detail) as session:  # what changed since the start
            identities.require(session, actor, "version.export", scope=version.scope)
            check_may_serve(session, store, version, version.scope, verified=verified)
            store.put_record(record, session)
        os.rename(folder, target)
        sync_folder(target.parent)
    return Exported(record.digest, target, body, notes)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _aside(store: Store, target: Path) -> Iterator[Path]:
    """A new temporary folder next to target, which is removed unless it was renamed.

    After a killed export, the next one to the same target removes it.
    """
    folder = target.parent / f".exporting-{target.name}"
    with store.lock("export", "an export"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            with room_for(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(form: Form, dtype: Dtype, base: Base, adapter: Path, folder: Path, version: Version) -> None:
    if form == "peft":
        if not (adapter / CONFIG_FILE).is_file():
            raise UsageError(
                f"{version.label} was trained in full: there is no adapter to export",
                where="peft",
                fix="export it as merged or as gguf",
            )
        for name in sorted(ADAPTER_FILES):
            shutil.copyfile(adapter / name, folder / name)
    elif form == "merged":
        from tunesmith.models.export.merging import write_merged

        write_merged(base, adapter, folder, dtype)
    else:
        from tunesmith.models.export.gguf import write_gguf

        # Ollama would follow a template in the file instead of the Modelfile's, where that one renders tools too.
        write_gguf(base, adapter, folder, dtype, version.label, template=form == "gguf")


def _write_modelfile(store: Store, candidate: Candidate, base: Base, folder: Path) -> tuple[str, ...]:
    """Write the Modelfile; returns what Ollama does otherwise."""
    from tunesmith.models.export import ollama
    from tunesmith.models.rendering import Renderer

    if candidate.retrieve is not None:
        raise Refused(
            f"{candidate.name} retrieves texts for each request, which Ollama does not", where="ollama", fix=_AS_GGUF
        )
    text, notes = ollama.modelfile(
        Renderer(base.folder), partial(compose, candidate),
        [example.request for example in _held_out(store, candidate)[:_RENDERED]],
        context_length=base.context_length, max_tokens=candidate.max_tokens,
    )  # fmt: skip
    (folder / ollama.FILE).write_bytes(text.encode())
    return notes


def _provenance(version: Version, candidate: Candidate, base: Base, form: Form, dtype: Dtype) -> dict[str, Any]:
    """The content of the folder's tunesmith.json. It depends neither on the machine nor on the day."""
    return {
        "version": version.label,
        "digest": version.digest,
        "form": form,
        "dtype": dtype,
        "base": {"spec": Path(base.spec).name if is_folder(base.spec) else base.spec}
        | {"digest": base.digest, "fingerprint": base.fingerprint},
        "training": candidate.training,
        "evaluation": version.evaluation,
        "verdict": version.verdict,
        "expires_at": version.expires_at,
        # The evaluation measured the weights with this prompt.
        "system": candidate.prompt,
        "answer_grammar": candidate.answer_grammar,
        "copied": list(candidate.copied),
        "answer_schema": None if candidate.answer_schema is None else parse_json(candidate.answer_schema),
    }


def _probes(store: Store, candidate: Candidate) -> list[tuple[Message, ...]]:
    """The held-out requests that an export is compared on, as the candidate asks them."""
    return [compose(candidate, example.request) for example in _held_out(store, candidate)[:_PROBES]]


def _held_out(store: Store, candidate: Candidate) -> list[Example]:
    if candidate.dataset is None:
        raise Refused(f"candidate {candidate.name} names no dataset with held-out requests to compare on")
    held_out = load_dataset(store, candidate.dataset).examples("test")
    if not held_out:
        raise Inconclusive("the dataset has no held-out rows to compare on", fix="set data.split.test")
    return held_out


def _judge(equality: Equality, tolerance: Tolerance) -> tuple[Outcome, str]:
    """The outcome and its reason. A missing figure fails."""
    export, served = equality.export, equality.served
    engine = f"the {equality.engine} engine"
    for name, kind, apart, allowed in (
        ("the export", "max", export.max_difference, tolerance.export["max"]),
        ("the export", "mean", export.mean_difference, tolerance.export["mean"]),
        (engine, "max", served.max_difference, tolerance.served["max"]),
    ):
        if apart is None or apart > allowed:
            return "fail", f"{name} differs from the adapter as trained by {apart} nats ({kind}), {allowed} are allowed"
    moves, allowed = equality.adapter_moves.mean_difference, tolerance.export["mean"]
    if moves is not None and moves <= allowed:
        return "inconclusive", (
            f"the adapter moves log-probabilities by {moves} nats in the mean, {allowed} are allowed: a missing one "
            "would not be noticed"
        )
    return "pass", ""
