"""What a candidate can be told in the project file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.candidates.candidate import Retrieve
from tunesmith.core.settings import Settings
from tunesmith.training.settings import TrainSettings


class CandidateSettings(Settings):
    """One entry of `candidates:`."""

    prompt: Annotated[str, Field(description="file with the system prompt; its text, not its name, is what counts")]
    shots: Annotated[int, Field(ge=0, le=64, description="training examples shown before every request")] = 0
    retrieve: Annotated[
        Retrieve | None, Field(description="training examples found for each request and shown before it")
    ] = None
    train: Annotated[TrainSettings | None, Field(description="train an adapter with this prompt")] = None
    constrain: Annotated[bool, Field(description="hold every answer to task.schema while it is decoded")] = False
    max_tokens: Annotated[int, Field(ge=1, le=32768, description="most tokens of an answer")] = 128
