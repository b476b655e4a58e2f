"""`gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Here, Json, Terminal, add_commands, draw_table

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.runs.gpu_check import GpuCheck


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_commands(app, **{"gpu-check": gpu_check})


def gpu_check(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the result there, as JSON.")
    ] = None,
    vllm: Annotated[
        str, typer.Option("--vllm", metavar="COMMAND", help="The command that starts vLLM, as ~/vllm/bin/vllm serve.")
    ] = "vllm serve",
    as_json: Json = False,
) -> None:
    """Check that everything works on this machine's GPU, and measure it: about five minutes, no download. Without a GPU
    a reduced form runs on the CPU. Exits with 1 if a check fails; checks that were left out do not fail."""
    from tunesmith.services.runs import gpu_check as services

    found = services.gpu_check(vllm=vllm, output=output, progress=Terminal())
    Here(as_json=as_json).emit(found, _draw)
    raise typer.Exit(0 if found.ok else 1)


def _draw(console: Console, found: GpuCheck) -> None:
    rows = [(each.name, each.outcome, f"{each.seconds:.0f} s", each.detail) for each in found.checks]
    where = found.gpu or "CPU: no GPU was measured"
    draw_table(console, rows, "check", "outcome", "took", "what was found", title=where)
    installed = (f"{name} {version or '(not installed)'}" for name, version in found.libraries.items())
    console.print(", ".join(installed), soft_wrap=True)
