"""`serve`: an OpenAI-compatible endpoint over what was released here; it also moves live rollouts on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit, say

if TYPE_CHECKING:
    import socket

    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(serve)


def serve(
    directory: Directory = HERE,
    as_json: Json = False,
    host: Annotated[str, typer.Option("--host", help="Where to listen; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    region: Annotated[str, typer.Option("--region", help="The region whose versions are served.")] = "",
) -> None:
    """Answer OpenAI clients with the champion (and, in a rollout, the canary) until stopped; look after rollouts."""
    import logging

    import uvicorn

    from tunesmith.pipeline import PipelineContext
    from tunesmith.project import open_project
    from tunesmith.registry.aliases import list_aliases
    from tunesmith.server.app import create_app
    from tunesmith.server.settings import ServerSettings
    from tunesmith.services.served_scorers import served_scorers

    project = open_project(directory)
    listening = _listen(host, port)
    context = PipelineContext(project, Terminal())
    app = create_app(
        project.store,
        context.engine,
        context.renderer.count_prompt,
        ServerSettings(region=region),
        scorers=served_scorers(project.settings.task.scorers, project.schema, project.root),
    )
    address, chosen = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    names = sorted({alias.name for alias in list_aliases(project.store) if alias.alias == "champion"})
    document = {"url": f"http://{shown}:{chosen}/v1", "models": [f"{name}@champion" for name in names]}
    emit(document, as_json, lambda console, _: _tell(console, document))
    if address not in ("127.0.0.1", "::1"):
        say("it can be reached from other machines, and speaks plain HTTP: put a proxy with TLS before it")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is loaded. Raises UsageError where the address cannot be had."""
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


def _tell(console: Console, document: dict[str, Any]) -> None:
    models = document["models"]
    model = models[0] if models else "NAME@champion"
    lines = [
        f"serving {', '.join(models) or 'nothing yet: tunesmith rollout start NAME@v1 gives it a champion'}",
        f"  url    {document['url']}",
        "  token  tunesmith users token NAME makes one",
        f'  try    curl {document["url"]}/chat/completions -H "Authorization: Bearer $TOKEN" \\',
        f"""           -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "..."}}]}}'""",
        f'  python openai.OpenAI(base_url="{document["url"]}", api_key=TOKEN)',
        "ctrl-C stops it",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
