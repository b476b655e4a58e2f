"""The settings of one candidate: an entry of `candidates:` in the project file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from tunesmith.core.values import Omitted, Settings
from tunesmith.records.candidate import Method, Retrieve
from tunesmith.training.settings import LEAST_SCORED, TrainSettings

HIGHEST_PRICE = 1e12  # beyond every currency's: with it, no cost becomes infinite


class TokenPrice(Settings):
    """The price of an endpoint's tokens."""

    prompt: float = Field(ge=0, le=HIGHEST_PRICE, description="money per million prompt tokens")
    answer: float = Field(ge=0, le=HIGHEST_PRICE, description="money per million answer tokens")

    def of(self, prompt: float, answer: float) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + answer * self.answer) / 1e6


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible URL. Its key is read from the environment and stored nowhere.

    Evaluating an endpoint sends the test rows' requests to it; a search or a training those for validation.
    """

    url: str = Field(description="the API's URL up to /v1, such as https://host/v1")
    model: str = Field(min_length=1, description="the model's name at the endpoint")
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the API key; without it no key is sent",
    )
    timeout: float = Field(default=60.0, gt=0, le=3600, description="seconds to wait for one answer")
    retries: int = Field(default=4, ge=0, le=20, description="how often a request is repeated after an error")
    parallel: int = Field(default=4, ge=1, le=64, description="how many requests are sent at the same time")
    logprobs: bool = Field(
        default=False, description="ask for log-probabilities, from which each answer gets a confidence"
    )
    price: TokenPrice | None = Field(default=None, description="the price of its tokens")

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://host/v1 or https://host/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("the URL has a user, a query or a fragment, which may hold a secret: use key_env instead")
        return url.rstrip("/")


def _judging(endpoint: EndpointSettings) -> EndpointSettings:
    if endpoint.price is not None or endpoint.logprobs:
        raise ValueError("a judge has neither price nor logprobs: they are read of candidates alone")
    return endpoint


JudgeSettings = Annotated[EndpointSettings, AfterValidator(_judging)]


class Shots(Settings):
    """Training examples that are shown before every request."""

    count: int = Field(ge=1, le=64, description="how many")
    choose: Literal["fixed", "diverse"] = Field(
        default="fixed",
        description="fixed: one of each group, in the order of hashed names; diverse: those that differ most",
    )


class Optimise(Settings):
    """Search on validation rows for shots (how many, which, in which order), for `k` and `by` of `retrieve` and, with a
    rewriter, for the prompt. What is written is tried first; the best by the primary metric answers."""

    calls: int = Field(
        default=800, ge=1, le=1_000_000, description="the most answers that it asks for, the rewriter's among them"
    )
    cost: float | None = Field(
        default=None,
        gt=0,
        le=HIGHEST_PRICE,
        description="money, where endpoints have a `price`: it ends with the best so far before answers as dear as the "
        "dearest would pass it",
    )
    rows: int = Field(default=100, ge=LEAST_SCORED, le=4096, description="the most validation rows that a try is asked")
    prompts: tuple[str, ...] = Field(default=(), description="further prompt files to try")
    rewriter: EndpointSettings | None = Field(
        default=None,
        description="a model that rewrites the prompt (GEPA), with half of the calls; needs `tunesmith[gepa]`. It is "
        "sent validation rows with their answers",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the choice of rows, shots and settings")

    @model_validator(mode="after")
    def _enough_calls(self) -> Optimise:
        if self.calls < 4 * self.rows:
            raise ValueError("a search takes at least four calls for each of its rows: raise calls, or lower rows")
        return self


class Constrain(Settings):
    """Decode only answers that are valid under task.schema, some of whose values are copied from the request."""

    fields: Annotated[
        tuple[str, ...],
        Field(
            alias="copy",
            min_length=1,
            description="text fields whose values must be words of the request's user turns, never of prompt, examples "
            "or passages: paths such as name, slots.* or items[].name. A value begins and ends with a word or a "
            "symbol of one turn and is spelled as there, with single spaces. A field that the request does not hold "
            "must be optional, or may be null: a required one gets some of the request's words",
        ),
    ]


class CandidateSettings(Settings):
    """One entry of `candidates:`."""

    base: Omitted[str] = Field(
        default=None, description="the base model that answers; by default the project's `base:`"
    )
    prompt: str | None = Field(
        default=None,
        description="file of the project with the system prompt, which replaces the system turn of rows and requests; "
        "without it each row's own system turn is used",
    )
    method: Method = Field(
        default="model",
        description="model: a language model answers. Two baselines that a model must beat: nearest gives the "
        "answer of the most similar training example; classifier is TF-IDF with logistic regression",
    )
    shots: Annotated[int, Field(ge=0, le=64)] | Shots = Field(
        default=0, description="training examples shown before every request: a number, or count and choose"
    )
    optimise: Optimise | None = Field(
        default=None, description="find shots, retrieval and prompt on the validation rows; `{}` takes the defaults"
    )
    prompt_of: str | None = Field(
        default=None, description="name of a candidate with `optimise`, whose prompt this one uses"
    )
    retrieve: Retrieve | None = Field(
        default=None, description="examples or passages that are retrieved for each request and put into the prompt"
    )
    train: TrainSettings | None = Field(
        default=None, description="train an adapter on the training rows, with this prompt"
    )
    weights: str | None = Field(
        default=None, description="name of another candidate whose trained adapter this one uses"
    )
    endpoint: EndpointSettings | None = Field(
        default=None, description="ask a model behind a URL instead of the base model"
    )
    version: str | None = Field(
        default=None,
        description="a registered version, as champion or NAME@v3, that answers the present test rows as it was "
        "registered, so that a gate can ask its successor not to be worse",
    )
    constrain: bool | Constrain = Field(
        default=False,
        description="decode only answers that are valid under task.schema, task.pattern or task.grammar: true; or, "
        "with a schema, the fields to copy as well. Keys that the schema does not list may repeat, and numbers "
        "without bounds may be longer than JSON readers take: set additionalProperties: false, minimum and maximum",
    )
    max_tokens: int = Field(default=128, ge=1, le=32768, description="the most tokens of an answer")

    @field_validator("constrain", mode="before")
    @classmethod
    def _true_or_copy(cls, given: Any) -> Any:
        # Of what is neither, pydantic would say that it is no boolean. It names a wrong key itself.
        if isinstance(given, bool | Constrain) or (isinstance(given, Mapping) and given.keys() - {"copy"}):
            return given
        fields = given.get("copy") if isinstance(given, Mapping) else None
        if not (isinstance(fields, list | tuple) and fields and all(isinstance(each, str) for each in fields)):
            raise ValueError("write true, or {copy: [slots.*]}")
        return given

    @property
    def copied(self) -> tuple[str, ...]:
        """The patterns of the fields that are copied from the request."""
        return self.constrain.fields if isinstance(self.constrain, Constrain) else ()

    @property
    def adapted(self) -> bool:
        """Whether it answers with a trained adapter, its own or another candidate's."""
        return self.train is not None or self.weights is not None

    @property
    def asks_base(self) -> bool:
        """Whether the project's base model answers, and not a baseline, an endpoint or a registered version."""
        return self.method == "model" and self.endpoint is None and self.version is None

    @property
    def wanted_shots(self) -> Shots | None:
        """The shots that `shots:` asks for."""
        if isinstance(self.shots, Shots):
            return self.shots
        return Shots(count=self.shots) if self.shots else None

    @model_validator(mode="after")
    def _fits_together(self) -> CandidateSettings:
        given = {key for key in self.model_fields_set if getattr(self, key) not in (None, False, 0)}
        if self.method != "model":
            _none_of(given - {"method", "max_tokens"}, f"method: {self.method} uses no language model")
        if self.version is not None:
            _none_of(given - {"version"}, "a version answers as it was registered")
        if self.endpoint is not None:
            _none_of(given & {"base", "train", "weights"}, "an endpoint answers with its own weights")
            if self.copied:
                raise ValueError("an endpoint takes a JSON Schema only, which cannot say copy: write constrain: true")
        if self.weights is not None:
            _none_of(given & {"train"}, "weights: uses another candidate's adapter")
        if self.prompt_of is not None:
            _none_of(given & {"prompt", "optimise"}, "prompt_of: uses another candidate's prompt")
        if self.optimise is not None:
            _none_of(given & {"train", "weights"}, "a search is for untuned candidates; see prompt_of")
            self._check_cost(self.optimise)
        return self

    def _check_cost(self, optimise: Optimise) -> None:
        """Raise ValueError where what the search may cost is not stated, or cannot be counted."""
        if optimise.rewriter is not None and (self.prompt is None or optimise.rewriter.logprobs):
            raise ValueError("a rewriter needs `prompt`, which it rewrites, and has no logprobs")
        priced = {each.price is not None for each in (self.endpoint, optimise.rewriter) if each is not None}
        if priced not in ((set[bool](), {False}) if optimise.cost is None else ({True},)):
            raise ValueError("optimise.cost and the `price` of each endpoint belong together: state all, or none")


def _none_of(keys: set[str], why: str) -> None:
    if keys:
        raise ValueError(f"{why}: remove {' and '.join(sorted(keys))}")
