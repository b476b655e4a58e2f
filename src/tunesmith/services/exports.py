"""Export of a version's weights to files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.core.view import View
from tunesmith.engines.factory import engine_kind, open_engine
from tunesmith.models.base import open_base
from tunesmith.models.export.gguf import check_supported
from tunesmith.models.export.merging import Dtype
from tunesmith.registry.export import Form, export_version
from tunesmith.registry.lineage import summary_line
from tunesmith.registry.versions import resolve
from tunesmith.services.actions import Acting, Named, Request, Short, action


class ExportedVersion(View):
    """Exported weights and the comparison with those that were measured. export: the export record's digest.

    files: name -> digest and bytes. equality: differences of log-probabilities; tolerance: the largest ones allowed.
    summary: the comparison in one line. notes: what other programs do not do as they answer.
    """

    export: str
    folder: str
    version: str
    form: Form
    dtype: Dtype
    files: dict[str, dict[str, Any]]
    equality: dict[str, Any]
    tolerance: dict[str, dict[str, float]]
    outcome: str
    reason: str
    notes: tuple[str, ...] = ()
    summary: Annotated[str, Field(exclude=True)]


class ExportVersion(Request):
    """An approved version whose weights are written to target, a new folder.

    form: peft (the adapter alone), merged (a Hugging Face folder) or gguf (for llama.cpp). dtype: of merged weights.
    tenant, region: the version's; by default those of whoever exports it.
    """

    version: Named
    target: Path
    form: Form
    dtype: Dtype = "bf16"
    tenant: Short | None = None
    region: Short | None = None


@action("version.export", permission="version.export")
def export(acting: Acting, asked: ExportVersion) -> ExportedVersion:
    """Write an approved version's weights to a new folder, after comparing them with those that were measured.

    Raises Refused where log-probabilities differ by more than the tolerance.
    """
    store, settings, progress = acting.store, acting.project.settings.engine, acting.progress
    found = resolve(store, asked.version, scope=acting.scope(asked.tenant, asked.region))
    candidate = load_candidate(store, found.candidate)
    base = open_base(store, candidate.base)
    if asked.form == "gguf":
        check_supported(base.folder)  # before anything slow
    done = export_version(
        store,
        found,
        asked.target.absolute(),
        form=asked.form,
        dtype=asked.dtype,
        base=base,
        engine=open_engine(base, settings, progress),
        engine_kind=engine_kind(base, settings),
        actor=acting.actor,
        progress=progress,
    )
    return ExportedVersion(
        export=done.record,
        folder=str(done.folder),
        version=found.label,
        notes=_notes(candidate),
        summary=summary_line(store.record(done.record)),
        **done.body,
    )


def _notes(candidate: Candidate) -> tuple[str, ...]:
    if candidate.answer_schema is None and candidate.answer_grammar is None:
        return ()
    rule = "grammar" if candidate.answer_schema is None else "schema"
    said = f"the weights do not hold answers to the {rule}: give it, from tunesmith.json, to the program that answers"
    notes = [said]
    if candidate.copied:
        fields = ", ".join(candidate.copied)
        notes.append(f"no other program copies {fields} from the request: such values can be invented there")
    if Constraint(candidate).any_order:
        notes.append(
            "other programs write keys in the schema's order, in which a model that learned another one may leave some "
            "out; here keys come in any order: measure the answers there, or do not hold them to the schema"
        )
    return tuple(notes)
