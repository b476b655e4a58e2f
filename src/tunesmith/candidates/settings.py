"""What a candidate can be told in the project file."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tunesmith.candidates.candidate import Method, Retrieve
from tunesmith.core.settings import Settings
from tunesmith.training.settings import TrainSettings


class TokenPrice(Settings):
    """What an endpoint charges."""

    prompt: Annotated[float, Field(ge=0, description="money per million prompt tokens")]
    answer: Annotated[float, Field(ge=0, description="money per million answer tokens")]


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible URL. Its key is read from the environment when it is asked, and kept nowhere.

    Held-out requests leave this machine when it is evaluated.
    """

    url: Annotated[str, Field(description="up to and with /v1, as https://host/v1")]
    model: Annotated[str, Field(min_length=1, description="the model's name there")]
    key_env: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key; none sends none"
        ),
    ] = None
    timeout: Annotated[float, Field(gt=0, le=3600, description="seconds to wait for one answer")] = 60.0
    retries: Annotated[int, Field(ge=0, le=20, description="further tries after a busy or broken connection")] = 4
    parallel: Annotated[int, Field(ge=1, le=64, description="requests under way at once")] = 4
    logprobs: Annotated[
        bool, Field(description="ask for the tokens' log-probabilities, to state how sure an answer is")
    ] = False
    price: Annotated[TokenPrice | None, Field(description="what it charges")] = None

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://host/v1 or https://host/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("a URL with a user, a query or a fragment may hold a secret: name key_env instead")
        return url.rstrip("/")


class Shots(Settings):
    """Training examples shown before every request."""

    count: Annotated[int, Field(ge=1, le=64, description="how many")]
    choose: Annotated[
        Literal["fixed", "diverse"],
        Field(description="fixed: one of each group, by the hash of its name; diverse: those least like one another"),
    ] = "fixed"


class Search(Settings):
    """Try prompts and shots on validation rows and keep the best by the primary metric. The budget is tries x rows."""

    prompts: Annotated[tuple[str, ...], Field(description="further prompt files; `prompt` is always tried")] = ()
    shots: Annotated[
        tuple[Annotated[int, Field(ge=0, le=64)], ...],
        Field(min_length=1, description="numbers of shots to try; each is drawn in several ways"),
    ] = (0, 4, 8)
    tries: Annotated[int, Field(ge=2, le=256, description="how many combinations are tried")] = 8
    rows: Annotated[int, Field(ge=1, le=4096, description="validation rows that each is tried on")] = 64
    seed: Annotated[int, Field(ge=0, description="another seed draws other shots")] = 0


class CandidateSettings(Settings):
    """One entry of `candidates:`."""

    prompt: Annotated[
        str | None, Field(description="file with the system prompt; its text, not its name, is what counts")
    ] = None
    method: Annotated[
        Method,
        Field(
            description="model answers with a language model; nearest (the answer of the training example most like "
            "the request) and classifier (TF-IDF and logistic regression, where the answers are few) are the floor "
            "that one must beat"
        ),
    ] = "model"
    shots: Annotated[int, Field(ge=0, le=64)] | Shots = Field(
        default=0, description="training examples shown before every request: a number, or count and choose"
    )
    search: Annotated[Search | None, Field(description="find prompt and shots on the validation rows")] = None
    retrieve: Annotated[
        Retrieve | None, Field(description="examples or passages found for each request and shown before it")
    ] = None
    train: Annotated[TrainSettings | None, Field(description="train an adapter with this prompt")] = None
    weights: Annotated[
        str | None, Field(description="answer with the adapter that another candidate trains, by its name")
    ] = None
    endpoint: Annotated[EndpointSettings | None, Field(description="ask an outside model instead of the base")] = None
    constrain: Annotated[bool, Field(description="hold every answer to task.schema while it is decoded")] = False
    max_tokens: Annotated[int, Field(ge=1, le=32768, description="most tokens of an answer")] = 128

    @property
    def adapted(self) -> bool:
        """Whether it answers with an adapter, its own or another's."""
        return self.train is not None or self.weights is not None

    @property
    def wanted_shots(self) -> Shots | None:
        """The shots it asks for without a search."""
        if isinstance(self.shots, Shots):
            return self.shots
        return Shots(count=self.shots) if self.shots else None

    @model_validator(mode="after")
    def _fits_together(self) -> CandidateSettings:
        given = {key for key in self.model_fields_set if getattr(self, key) not in (None, False, 0)}
        if self.method != "model":
            _none_of(given - {"method", "max_tokens"}, f"method: {self.method} asks no language model")
        elif self.prompt is None:
            raise ValueError("prompt: name the file with the system prompt")
        if self.endpoint is not None:
            _none_of(given & {"train", "weights"}, "an endpoint's weights are its own")
        if self.weights is not None:
            _none_of(given & {"train", "search"}, "weights: are another candidate's")
        if self.search is not None:
            _none_of(given & {"train", "shots"}, "a search chooses prompt and shots itself")
        return self


def _none_of(keys: set[str], why: str) -> None:
    if keys:
        raise ValueError(f"{why}, so {' and '.join(sorted(keys))} cannot stand beside it")
