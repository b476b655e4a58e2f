"""`chat`: talk to any candidate or version."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit, say


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
    from tunesmith.candidates.answering import Answerer
    from tunesmith.candidates.candidate import load_candidate
    from tunesmith.chain import Chain
    from tunesmith.core.digests import is_digest
    from tunesmith.core.errors import UsageError
    from tunesmith.core.messages import Message
    from tunesmith.inference.engine import Completion
    from tunesmith.project import open_project
    from tunesmith.registry.versions import resolve, verified_copy

    project = open_project(directory)
    walk = Chain(project, Terminal())
    with contextlib.ExitStack() as stack:
        if who in project.settings.candidates:
            candidate = load_candidate(project.store, walk.candidate(who))
            walk.load_adapter(candidate.training)
        elif "@" not in who and not is_digest("sha256:" + who.removeprefix("sha256:").ljust(64, "0")):
            walk.settings_of(who)  # says which candidates there are
            return
        else:
            loaded = stack.enter_context(verified_copy(project.store, resolve(project.store, who)))
            candidate = loaded.candidate
            if loaded.adapter is not None and candidate.training is not None:
                walk.engine.load_adapter(candidate.training, loaded.adapter)
        answerer = Answerer(project.store, walk.engine, candidate)
        if message is not None:
            asked = answerer.generation([Message(role="user", content=message)])
            answer = walk.engine.generate([asked], answerer.adapter)[0]
            document = {"answer": answer.text, "finish": answer.finish, "candidate": candidate.name}
            emit(document, as_json, lambda console: console.print(answer.text, markup=False))
            return
        if as_json:
            raise UsageError("--json needs --message", fix="ask one question with -m")
        say(f"talking to {candidate.name}; an empty line or ctrl-D ends")
        turns: list[Message] = []
        with contextlib.suppress(EOFError):
            while text := input("> ").strip():
                turns.append(Message(role="user", content=text))
                for piece in walk.engine.stream(answerer.generation(turns), answerer.adapter):
                    if isinstance(piece, Completion):
                        turns.append(Message(role="assistant", content=piece.text))
                        print()
                    else:
                        print(piece, end="", flush=True)
