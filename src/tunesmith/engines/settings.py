"""What the project file says of the engine that answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.core.settings import Settings


class VllmSettings(Settings):
    """A vLLM server that runs the project's base model, started elsewhere."""

    kind: Annotated[Literal["vllm"], Field(description="a vLLM server, over its OpenAI-compatible HTTP API")]
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$", description="such as http://127.0.0.1:8001")]
    key_env: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the server's API key"),
    ] = None
    adapters: Annotated[
        str | None,
        Field(description="folder that adapters are put into for the server to read, seen by both under one path"),
    ] = None
    connect_seconds: Annotated[float, Field(gt=0, le=600, description="longest wait for a connection")] = 5.0
    answer_seconds: Annotated[float, Field(gt=0, le=86400, description="longest wait for one answer")] = 300.0
    retries: Annotated[int, Field(ge=0, le=10, description="further tries where the server is away or overloaded")] = 3
    concurrency: Annotated[int, Field(ge=1, le=1024, description="requests under way at once")] = 64


EngineSettings = VllmSettings
NATIVE = "native"
HF = "hf"  # in this process too, for the families that the embedded engine does not compute
