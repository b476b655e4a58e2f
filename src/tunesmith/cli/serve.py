"""`serve` and `chat`: answer OpenAI clients over HTTP, or one person on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith import services
from tunesmith.cli.terminal import Drawn, Here, NotNegative, Positive, Terminal, add_commands, printed_text, say
from tunesmith.core.errors import UsageError
from tunesmith.core.text.display import LogFormatter, NoRepeats, printable, printable_line

if TYPE_CHECKING:
    import socket

    from tunesmith.candidates.answering import Answerer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, serve, chat)


def serve(
    here: Here,
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    region: str = "",
    grace: Annotated[float, typer.Option(min=0.1)] = 30.0,
    per_user: Positive = 128,
    token_rate: NotNegative = 0,
    tenant_rate: NotNegative = 0,
    unread: Annotated[float, typer.Option(min=1)] = 30.0,
    idle_connections: Positive = 512,
    largest_file: Positive = 512,
    base_of: str | None = None,
    worker: Annotated[bool, typer.Option()] = True,
) -> None:
    """Answer OpenAI clients with the champion, and in a rollout with the canary too. Moves rollouts on, and performs
    queued jobs by a worker in a separate process.

    host: Where to listen; by default for this machine only.
    port: 0 takes a free one.
    region: The region whose versions are served.
    grace: Seconds that requests under way may take after SIGTERM or ctrl-C.
    per_user: Requests that one user may have waiting or being answered.
    token_rate: Requests a minute of one token; 0: any number.
    tenant_rate: Requests a minute of all tokens of a tenant; 0: any number.
    unread: Seconds that a client may read nothing of an answer that waits for it.
    idle_connections: Connections kept without a request; with more, the oldest is closed.
    largest_file: Megabytes (2**20 bytes) of the largest file that is uploaded.
    base_of MODEL: Answer with the base of this name in fine_tuning.models; by default with the project's.
    worker: Also perform queued jobs, in a separate process.
    """
    import logging

    from tunesmith.core.telemetry import sending
    from tunesmith.pipeline.context import PipelineContext
    from tunesmith.rollout.served_scorers import served_scorers
    from tunesmith.server.app import create_app
    from tunesmith.server.console.login import client_secret
    from tunesmith.server.limits import ServerSettings
    from tunesmith.server.listening import DrainingServer
    from tunesmith.server.serving import Serving

    project = here.project
    beside = services.jobs.OwnWorker(project, say) if worker else None
    if project.settings.login is not None:
        client_secret(project.settings.login)
    listening = _listen(host, port)
    telemetry = contextlib.ExitStack()
    telemetry.enter_context(sending())
    answering = project if base_of is None else project.on_base(base_of)
    context = PipelineContext(answering.in_this_process(), Terminal())
    served, *others = [(each.engine, each.renderer) for each in context.bases]
    serving = Serving(
        project.store,
        *served,
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
        keeper=services.review.case_keeper(project),
        holder=services.review.answer_holder(project),
        others=others,
    )
    app = create_app(serving)
    address, chosen = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    champions = services.rollouts.champions(project.store)
    names = sorted({one.name for one in champions if one.refused is None})
    document = {"url": f"http://{shown}:{chosen}/v1", "models": [f"{name}@champion" for name in names]}
    listening.listen(_BACKLOG)  # before the URL is printed, so that a client that connects at once is not refused
    here.emit(document, _draw_serving)
    for warning in filter(None, (one.warning for one in champions)):
        say(warning)
    if address not in ("127.0.0.1", "::1"):
        say("other machines can reach it, and it speaks plain HTTP: put a proxy with TLS in front of it")
    logs = logging.StreamHandler()
    logs.setFormatter(LogFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logs.addFilter(NoRepeats())
    logging.basicConfig(level=logging.INFO, handlers=[logs])
    if beside is not None:
        beside.start()
    try:
        DrainingServer(app).run(sockets=[listening])
    finally:
        if beside is not None:
            beside.stop(grace)
        telemetry.close()


def chat(here: Here, who: str, *, message: Annotated[str | None, typer.Option("--message", "-m")] = None) -> None:
    """Talk to a candidate of the project, or to a registered version (verified before it is loaded).

    who: A candidate's name, NAME@v1, NAME@champion or a version's digest.
    message: Ask only this, then exit.
    """
    if here.as_json and message is None:
        raise UsageError("--json needs --message", fix="ask one question with -m")
    with services.answers.opened(here.project, who, progress=Terminal()) as answerer:
        if message is not None:
            here.emit(services.answers.ask(answerer, message), _draw_answer)
            return
        say(f"talking to {answerer.candidate.name}; an empty line or ctrl-D ends")
        with contextlib.suppress(EOFError):
            _converse(answerer)


def _converse(answerer: Answerer) -> None:
    """Read turns from the terminal and print the answers as they come, until an empty line."""
    from tunesmith.core.messages import Message
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

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        what, fix = f"cannot listen there: {error.strerror or error}", "choose another --port"
        raise UsageError(what, where=f"{host}:{port}", fix=fix) from error
    return listening


def _draw_serving(document: Mapping[str, Any]) -> Drawn:
    models, url = document["models"], document["url"]
    model = models[0] if models else "NAME@champion"
    yield f"serving {', '.join(models) or 'nothing yet: tunesmith rollout start NAME@v1 gives it a champion'}"
    yield f"  url    {url}"
    yield "  token  tunesmith users token NAME makes one"
    yield f"  pages  tunesmith login-link --url {url.removesuffix('/v1')} opens them in a browser"
    yield f'  try    curl {url}/chat/completions -H "Authorization: Bearer $TOKEN" \\'
    yield f"""           -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "..."}}]}}'"""
    yield f'  python openai.OpenAI(base_url="{url}", api_key=TOKEN)'
    yield "ctrl-C stops it after the requests under way, a second one at once"


def _draw_answer(answer: services.answers.ChatAnswer) -> Drawn:
    yield from printed_text(answer.answer)(answer)
    if answer.sources:
        yield f"(from {', '.join(answer.sources)})", "dim"
