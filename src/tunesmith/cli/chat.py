"""`chat`: talk to any candidate or version."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit, say

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(chat)


def chat(
    who: Annotated[str, typer.Argument(help="A candidate's name, NAME@v1, NAME@champion or a version's digest.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this once and leave.")] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Talk to a candidate of the project, or to a registered version (verified before it is loaded)."""
    from tunesmith import pipeline
    from tunesmith.candidates.answering import Answerer
    from tunesmith.candidates.candidate import load_candidate
    from tunesmith.core.digests import is_digest
    from tunesmith.core.errors import UsageError
    from tunesmith.core.messages import Message
    from tunesmith.engines.protocol import Completion
    from tunesmith.project import open_project
    from tunesmith.registry.versions import resolve, verified_copy

    project = open_project(directory)
    walk = pipeline.PipelineContext(project, Terminal())
    with contextlib.ExitStack() as stack:
        if who in project.settings.candidates:
            answerer = pipeline.answerer(walk, load_candidate(project.store, pipeline.candidate(walk, who)))
        elif "@" not in who and not is_digest("sha256:" + who.removeprefix("sha256:").ljust(64, "0")):
            walk.settings_of(who)  # says which candidates there are
            return
        else:
            loaded = stack.enter_context(verified_copy(project.store, resolve(project.store, who)))
            if loaded.adapter is not None and loaded.candidate.training is not None:
                walk.engine.load_adapter(loaded.candidate.training, loaded.adapter)
            engine = walk.engine if loaded.candidate.asks_base else None
            answerer = Answerer(project.store, engine, loaded.candidate)
        if message is not None:
            turn = [Message(role="user", content=message)]
            answer = answerer.responder.generate([answerer.generation(turn)], answerer.adapter)[0]
            sources = list(answerer.composer.retrieved(turn).sources)
            document = {"answer": answer.text, "finish": answer.finish, "candidate": answerer.name, "sources": sources}
            emit(document, as_json, lambda console, _: _show(console, answer.text, sources))
            return
        if as_json:
            raise UsageError("--json needs --message", fix="ask one question with -m")
        say(f"talking to {answerer.name}; an empty line or ctrl-D ends")
        turns: list[Message] = []
        with contextlib.suppress(EOFError):
            while text := input("> ").strip():
                turns.append(Message(role="user", content=text))
                for piece in answerer.responder.stream(answerer.generation(turns), answerer.adapter):
                    if isinstance(piece, Completion):
                        print()
                        if cited := answerer.composer.retrieved(turns).sources:
                            print(f"(from {', '.join(cited)})")
                        turns.append(Message(role="assistant", content=piece.text))
                    else:
                        print(piece, end="", flush=True)


def _show(console: Console, text: str, sources: Sequence[str]) -> None:
    console.print(text, markup=False)
    if sources:
        console.print(f"(from {', '.join(sources)})", markup=False, style="dim")
