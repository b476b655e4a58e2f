"""`serve` and `chat`: answer OpenAI clients over HTTP, or one person on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import Here, Terminal, add_commands, printed_text, say

if TYPE_CHECKING:
    import socket

    from rich.console import Console

    from tunesmith.candidates.answering import Answerer
    from tunesmith.services.chat import ChatAnswer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, serve, chat)


def serve(
    here: Here,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; by default for this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    region: Annotated[str, typer.Option("--region", help="The region whose versions are served.")] = "",
    grace: Annotated[
        float,
        typer.Option("--grace", min=0.1, help="Seconds that requests under way may take after SIGTERM or ctrl-C."),
    ] = 30.0,
    per_user: Annotated[
        int,
        typer.Option("--per-user", min=1, help="Requests that one user may have waiting or being answered."),
    ] = 128,
    token_rate: Annotated[
        int, typer.Option("--token-rate", min=0, help="Requests a minute of one token; 0: any number.")
    ] = 0,
    tenant_rate: Annotated[
        int, typer.Option("--tenant-rate", min=0, help="Requests a minute of all tokens of a tenant; 0: any number.")
    ] = 0,
    unread: Annotated[
        float,
        typer.Option("--unread", min=1, help="Seconds that a client may read nothing of an answer that waits for it."),
    ] = 30.0,
    idle_connections: Annotated[
        int,
        typer.Option(
            "--idle-connections", min=1, help="Connections kept without a request; with more, the oldest is closed."
        ),
    ] = 512,
    largest_file: Annotated[
        int, typer.Option("--largest-file", min=1, help="Megabytes (2**20 bytes) of the largest file that is uploaded.")
    ] = 512,
    base_of: Annotated[
        str | None,
        typer.Option(
            "--base-of",
            metavar="MODEL",
            help="Answer with the base of this name in fine_tuning.models; by default with the project's.",
        ),
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Also perform queued jobs, in a separate process.")
    ] = True,
) -> None:
    """Answer OpenAI clients with the champion, and in a rollout with the canary too. Moves rollouts on, and performs
    queued jobs by a worker in a separate process."""
    import logging

    from tunesmith.core.scope import Scope
    from tunesmith.core.telemetry import sending
    from tunesmith.core.text.display import LogFormatter, NoRepeats
    from tunesmith.pipeline import PipelineContext
    from tunesmith.registry.aliases import list_aliases
    from tunesmith.server.app import create_app
    from tunesmith.server.console.login import client_secret
    from tunesmith.server.limits import ServerSettings
    from tunesmith.server.listening import DrainingServer
    from tunesmith.server.serving import Serving
    from tunesmith.services.held import answer_holder
    from tunesmith.services.review import case_keeper
    from tunesmith.services.rollouts import refused_champions, served_scorers
    from tunesmith.services.webhooks import check_secrets
    from tunesmith.services.worker import OwnWorker

    project = here.project
    if worker:
        check_secrets(project)
    if project.settings.login is not None:
        client_secret(project.settings.login)
    listening = _listen(host, port)
    telemetry = contextlib.ExitStack()
    telemetry.enter_context(sending())
    answering = project if base_of is None else project.on_base(base_of)
    context = PipelineContext(answering.in_this_process(), Terminal())
    serving = Serving(
        project.store,
        context.engine,
        context.renderer,
        ServerSettings(
            region=region,
            grace_seconds=grace,
            per_user=per_user,
            token_rate=token_rate,
            tenant_rate=tenant_rate,
            unread_seconds=unread,
            idle_connections=idle_connections,
            file_bytes=largest_file << 20,
        ),
        scorers=served_scorers(project.settings.task.scorers, project.schema, project.root),
        project=project,
        keeper=case_keeper(project),
        holder=answer_holder(project),
    )
    app = create_app(serving)
    address, chosen = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    refused = {(one.name, one.scope): one.warning for one in refused_champions(project.store)}
    champions = [alias for alias in list_aliases(project.store) if alias.alias == "champion"]
    names = sorted({one.name for one in champions if (one.name, Scope(one.tenant, one.region)) not in refused})
    document = {"url": f"http://{shown}:{chosen}/v1", "models": [f"{name}@champion" for name in names]}
    listening.listen(_BACKLOG)  # before the URL is printed, so that a client that connects at once is not refused
    here.emit(document, _draw_serving)
    for warning in refused.values():
        say(str(warning))
    if address not in ("127.0.0.1", "::1"):
        say("other machines can reach it, and it speaks plain HTTP: put a proxy with TLS in front of it")
    logs = logging.StreamHandler()
    logs.setFormatter(LogFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logs.addFilter(NoRepeats())
    logging.basicConfig(level=logging.INFO, handlers=[logs])
    beside = OwnWorker(project.root, say) if worker else None
    try:
        DrainingServer(app).run(sockets=[listening])
    finally:
        if beside is not None:
            beside.stop(grace)
        telemetry.close()


def chat(
    here: Here,
    who: Annotated[str, typer.Argument(help="A candidate's name, NAME@v1, NAME@champion or a version's digest.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask only this, then exit.")] = None,
) -> None:
    """Talk to a candidate of the project, or to a registered version (verified before it is loaded)."""
    from tunesmith.core.errors import UsageError
    from tunesmith.services.chat import ask, opened

    if here.as_json and message is None:
        raise UsageError("--json needs --message", fix="ask one question with -m")
    with opened(here.project, who, progress=Terminal()) as answerer:
        if message is not None:
            here.emit(ask(answerer, message), _draw_answer)
            return
        say(f"talking to {answerer.candidate.name}; an empty line or ctrl-D ends")
        with contextlib.suppress(EOFError):
            _converse(answerer)


def _converse(answerer: Answerer) -> None:
    """Read turns from the terminal and print the answers as they come, until an empty line."""
    from tunesmith.core.messages import Message
    from tunesmith.core.text.display import printable, printable_line
    from tunesmith.engines.protocol import Completion, Scored

    turns: list[Message] = []
    asked_as = answerer.composer.asked_as
    while text := input("> ").strip():
        turns.append(Message(role="user", content=text))
        for piece in answerer.responder.stream(answerer.generation(turns, asked_as), answerer.candidate.training):
            if isinstance(piece, Completion):
                print()
                if sources := answerer.composer.retrieved(turns, asked_as).sources:
                    print(printable_line(f"(from {', '.join(sources)})"))
                turns.append(Message(role="assistant", content=piece.text))
            else:
                print(printable(piece.text if isinstance(piece, Scored) else piece), end="", flush=True)


_BACKLOG = 2048  # connections that may wait to be accepted, as uvicorn has it


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, made before anything slow is loaded. Raises UsageError where the address is taken."""
    import socket

    from tunesmith.core.errors import UsageError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen there: {error.strerror or error}", where=f"{host}:{port}", fix="choose another --port"
        ) from error
    return listening


def _draw_serving(console: Console, document: Mapping[str, Any]) -> None:
    models = document["models"]
    model = models[0] if models else "NAME@champion"
    lines = [
        f"serving {', '.join(models) or 'nothing yet: tunesmith rollout start NAME@v1 gives it a champion'}",
        f"  url    {document['url']}",
        "  token  tunesmith users token NAME makes one",
        f"  pages  tunesmith login-link --url {document['url'].removesuffix('/v1')} opens them in a browser",
        f'  try    curl {document["url"]}/chat/completions -H "Authorization: Bearer $TOKEN" \\',
        f"""           -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "..."}}]}}'""",
        f'  python openai.OpenAI(base_url="{document["url"]}", api_key=TOKEN)',
        "ctrl-C stops it after the requests under way, a second one at once",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _draw_answer(console: Console, found: ChatAnswer) -> None:
    printed_text(found.answer)(console, found)
    if found.sources:
        console.print(f"(from {', '.join(found.sources)})", style="dim")
