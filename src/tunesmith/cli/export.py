"""`export`: a version's weights as files for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit

if TYPE_CHECKING:
    from rich.console import Console


class Form(StrEnum):
    """What is written."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"


class Dtype(StrEnum):
    """What merged weights are rounded to."""

    bf16 = "bf16"
    fp32 = "fp32"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(export)


def export(
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@champion, or the start of a version's digest.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; a folder that is not there yet.")],
    form: Annotated[
        Form, typer.Option("--as", help="peft: the adapter alone; merged: a Hugging Face folder; gguf: for llama.cpp.")
    ],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of merged weights; an adapter stays as it is.")] = Dtype.bf16,
    tenant: Annotated[str, typer.Option("--tenant", help="The tenant it is for.")] = "",
    region: Annotated[str, typer.Option("--region", help="The region it is for.")] = "",
    directory: Directory = HERE,
    as_json: Json = False,
    actor: Annotated[
        str | None, typer.Option("--by", metavar="USER", help="Who acts; by default $TUNESMITH_USER, else the owner.")
    ] = None,
) -> None:
    """Write an approved version's weights for other programs, after they were compared with what was measured.

    The same held-out requests go through the adapter as trained, as served and as exported. Exit 3 where their
    log-probabilities differ by more than the tolerance; the figures stay in the store: `tunesmith show VERSION`.
    """
    from tunesmith.candidates.candidate import load_candidate
    from tunesmith.engines.factory import engine_kind, open_engine
    from tunesmith.models.base import open_base
    from tunesmith.models.export.gguf import check_offered
    from tunesmith.project import open_project
    from tunesmith.registry.export import export_version
    from tunesmith.registry.versions import resolve
    from tunesmith.store.identities import acting

    project = open_project(directory)
    store, settings = project.store, project.settings.engine
    found = resolve(store, version, tenant=tenant, region=region)
    base = open_base(store, load_candidate(store, found.candidate).base)
    if form is Form.gguf:
        check_offered(base.folder)  # before anything slow
    done = export_version(
        store,
        found,
        target.absolute(),
        form=form.value,
        dtype=dtype.value,
        base=base,
        engine=open_engine(base, settings),
        engine_kind=engine_kind(base, settings),
        actor=acting(store, actor),
        progress=Terminal(),
    )
    document = {"export": done.record, "folder": str(done.folder), "version": found.label, **done.body}

    def draw(console: Console) -> None:
        from tunesmith.registry.lineage import tells

        console.print(f"{found.label} is exported to {done.folder}", markup=False, soft_wrap=True)
        console.print(tells(store.record(done.record)), markup=False)
        for name, facts in done.body["files"].items():
            console.print(f"  {name}  {facts['bytes']:,} bytes", style="dim", markup=False)

    emit(document, as_json, draw)
