"""Settings that engines read: which engines train and answer, and which weights a training changes and how."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.values import Duration, Settings

GEMMAS = ("gemma", "gemma2", "gemma3_text")
NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", *GEMMAS)
# Shown wherever a base is of another family.
SLOW = "is run by transformers' own modules: as exact as the native engine, but slower on a CPU"
# The linear layers of engines.native.network.network.GROUPS, repeated here so that reading settings imports no torch.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STARTED = ("gpus", "command", "flags", "start_seconds")
_OUR_FLAGS = ("--host", "--port", "--uds", "--api-key", "--enable-lora", "--served-model-name", "--model")
_Url = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")]
_ADAPTER_SETTINGS = ("rank", "alpha", "targets", "scaling", "start", "dora", "b_rate")


class RaySettings(Settings):
    """A Ray cluster's workers: they train together, and each answers a part of an evaluation's requests."""

    workers: int = Field(ge=1, le=4096, description="how many processes; with GPUs one for each GPU")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={"CPU": 1.0},
        min_length=1,
        description="what each worker takes of the cluster, such as {GPU: 1, CPU: 8}",
    )
    address: str | None = Field(
        default=None,
        description="the cluster's, such as head:6379; by default $RAY_ADDRESS, or a cluster on this machine",
    )

    @model_validator(mode="after")
    def _check_gpus(self) -> RaySettings:
        if self.resources.get("GPU", 1) != 1:
            raise ValueError("a worker computes on one GPU: write GPU: 1, and as many workers as GPUs")
        return self


class EngineSettings(Settings):
    """Which engine trains. This process answers, or a Ray cluster's workers."""

    train: Literal["auto", "native", "hf"] = Field(
        default="auto",
        description="the engine that trains: native, Tunesmith's own on the CPU; hf, transformers and PEFT, on a "
        "GPU where there is one; auto takes hf where a GPU is present, where native does not compute the base's "
        "family, for quantize, dora, start: pissa, attention or precision: fp32, and on several processes, else "
        "native. On a GPU, auto and hf also answer by hf",
    )
    ray: RaySettings | None = Field(
        default=None, description="train, and answer evaluations, on a Ray cluster; needs `tunesmith[ray]`"
    )


class VllmSettings(EngineSettings):
    """vLLM servers that run the project's base model: url or urls name those that run already, start starts some."""

    kind: Literal["vllm"] = Field(description="vLLM servers, over their OpenAI-compatible HTTP API")
    url: _Url | None = Field(default=None, description="a server's address, such as http://127.0.0.1:8001")
    urls: tuple[_Url, ...] | None = Field(
        default=None, min_length=1, description="the addresses of several servers, in place of url"
    )
    start: int | None = Field(
        default=None, ge=1, le=64, description="how many servers each command starts and stops; true: one"
    )
    gpus: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        description="numbers of the GPUs that are divided among the servers that are started, [] for none; by "
        "default a server sees what this process sees",
    )
    command: str = Field(
        default="vllm serve",
        min_length=1,
        description="the command that is started; the base's folder and flags follow it",
    )
    flags: tuple[str, ...] = Field(
        default=(), description="further flags of that command, such as [--max-model-len, '8192']; they win over ours"
    )
    start_seconds: Duration = Field(
        default=1800.0, gt=0, description="longest time that a started server may take until it answers"
    )
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the servers' API key",
    )
    adapters: str | None = Field(
        default=None,
        description="folder that adapters are put into for the servers to read, seen by all under one path",
    )
    connect_seconds: float = Field(default=5.0, gt=0, le=600, description="longest wait for a connection")
    answer_seconds: float = Field(default=300.0, gt=0, le=86400, description="longest wait for one answer")
    retries: int = Field(default=3, ge=0, le=10, description="further tries where the server is away or overloaded")
    concurrency: int = Field(default=64, ge=1, le=1024, description="requests under way at once on each server")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of the servers that run already."""
        return (self.url,) if self.url is not None else self.urls or ()

    @model_validator(mode="after")
    def _check_servers(self) -> VllmSettings:
        if sum(given is not None for given in (self.url, self.urls, self.start)) != 1:
            raise ValueError("give one of url (a server that runs), urls (several), start (how many to start)")
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError("urls names a server twice")
        if self.start is None:
            if given := [key for key in _STARTED if key in self.model_fields_set]:
                raise ValueError(f"{given[0]} applies to servers that start starts")
            return self
        if self.key_env is not None:
            raise ValueError("key_env applies to url and urls: a server that is started gets a new key")
        if self.gpus is None and self.start > 1:
            raise ValueError(f"start: {self.start} needs gpus: the numbers of the servers' GPUs, or [] for none")
        if self.gpus and (len(self.gpus) % self.start or len(set(self.gpus)) < len(self.gpus)):
            raise ValueError(f"gpus: {len({*self.gpus})} different GPUs cannot be divided among {self.start} servers")
        if given := [flag for flag in self.flags if flag.split("=")[0] in _OUR_FLAGS]:
            raise ValueError(f"flags: {given[0]} is set by Tunesmith")
        return self


def _engine_tag(given: Any) -> str:
    if isinstance(given, dict):
        return "vllm" if {*given} - {*EngineSettings.model_fields} else "here"
    return "vllm" if isinstance(given, VllmSettings) else "here"


# `engine:` of a project file. Keys that EngineSettings does not have are a server's.
AnyEngineSettings = Annotated[
    Annotated[EngineSettings, Tag("here")] | Annotated[VllmSettings, Tag("vllm")], Discriminator(_engine_tag)
]
NATIVE: Final = "native"
HF: Final = "hf"  # in this process too


class WeightSettings(Settings):
    """Which weights a training changes, and how they are parametrised."""

    method: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains a low-rank adapter; full trains the weights themselves, with norms, embeddings "
        "and head",
    )
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the adapter")
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA's alpha: the adapter is scaled by alpha / rank. Default: twice the rank"
    )
    targets: tuple[str, ...] = Field(
        default=("all",),
        min_length=1,
        description="linear layers to adapt: all, names such as q_proj, or patterns such as [qv]_proj",
    )
    scaling: Literal["rank", "root"] = Field(
        default="rank",
        description="rank divides alpha by the rank; root divides it by the rank's square root (rsLoRA), "
        "which suits high ranks",
    )
    quantize: Literal["4bit"] | None = Field(
        default=None,
        description="4bit keeps the frozen base in 4 bits while an adapter is trained (QLoRA), with transformers "
        "and bitsandbytes: less memory, more time. Needs `tunesmith[qlora]`. Default: full precision",
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None,
        description="numbers of the frozen base, and of what is computed with it; an adapter and the optimiser are "
        "fp32. The native engine keeps the base in bf16. Default: bf16 on a GPU (fp32 with start: pissa), and fp32 "
        "with transformers on the CPU",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None,
        description="transformers' implementation of attention. Default: sdpa where the base has it, else eager. "
        "flash_attention_2 needs a GPU and the package flash-attn",
    )
    kernels: Literal["liger"] | None = Field(
        default=None,
        description="liger replaces a family's norms, activations and rotary embeddings in transformers by Liger's "
        "kernels. Needs a GPU and `tunesmith[liger]`; not run yet. Default: transformers' own",
    )
    start: Literal["zero", "pissa"] = Field(
        default="zero",
        description="zero starts with no change (A random, B zero); pissa starts at the principal singular "
        "vectors of the weight and is saved as an ordinary adapter of twice the rank",
    )
    dora: bool = Field(default=False, description="also train the magnitude of each row of the adapted weights (DoRA)")
    layers: int | None = Field(default=None, ge=1, description="train only the last N layers. Default: all layers")
    recompute: bool = Field(
        default=False,
        description="keep only what each layer reads and compute the rest again in the backward pass (activation "
        "checkpointing): less memory, about a third more time. For bases that the hf engine trains",
    )
    b_rate: float = Field(
        default=1.0,
        ge=1,
        le=64,
        description="learning rate of B as a multiple of A's (LoRA+; its authors recommend 16). "
        "Default: 4 for plain adapters of bases with hidden states of up to 1,024 numbers where learning_rate is "
        "left out, else 1",
    )

    def adapter_alpha(self) -> float:
        """LoRA's alpha, with its default."""
        return float(2 * self.rank if self.alpha is None else self.alpha)

    @model_validator(mode="after")
    def _check_method(self) -> WeightSettings:
        if self.method == "full" and (given := [key for key in _ADAPTER_SETTINGS if key in self.model_fields_set]):
            raise ValueError(f"{given[0]} applies to adapters only: leave it out with method: full")
        others = {"method: full": self.method == "full", "start: pissa": self.start == "pissa", "dora": self.dora}
        if self.quantize is not None and (other := next((name for name, given in others.items() if given), None)):
            raise ValueError(
                f"quantize: 4bit cannot be combined with {other}, which needs the base's own weights; leave one of the "
                "two out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The settings as data, without those that the method does not use."""
        stated: dict[str, Any] = write(self)
        return {key: value for key, value in stated.items() if self.method == "lora" or key not in _ADAPTER_SETTINGS}


def is_native(family: str) -> bool:
    """Whether the native engine computes a family; the hf engine runs any other."""
    return family in NATIVE_FAMILIES


def match_layers(wanted: Iterable[str], names: Iterable[str], where: str) -> set[str]:
    """The names that match wanted: names, shell patterns such as `*_proj` and `[qv]_proj`, or `all`.

    where: the setting that wanted comes from. Raises UsageError for an entry that matches no name.
    """
    known = sorted(names)
    matches = {each: {name for name in known if each == "all" or fnmatchcase(name, each)} for each in wanted}
    if lost := [each for each, matching in matches.items() if not matching]:
        there = f"it has {', '.join(known)}, or write all"
        raise UsageError(f"the base has no linear layer called {lost[0]!r}; {there}", where=where)
    return set[str]().union(*matches.values())


def lacks(family: str, weights: WeightSettings, *, ranks: int = 1, where: str = "train") -> str | None:
    """Why this engine does not train a base of a family with these settings; None if it does.

    ranks: how many processes train together. where: the weights' place in the project file.
    """
    needs = {
        f"does not compute the family {family!r}, but {', '.join(NATIVE_FAMILIES)}": not is_native(family),
        f"does not train on a base in 4 bits, which {where}.quantize asks for": weights.quantize is not None,
        f"keeps the base in bf16, and {where}.precision asks for fp32": weights.precision == "fp32",
        f"has its own attention, and {where}.attention names another": weights.attention is not None,
        f"has its own kernels, and {where}.kernels names others": weights.kernels is not None,
        f"does not compute layers again, which {where}.recompute asks for": weights.recompute,
        f"trains no magnitudes, which {where}.dora asks for": weights.dora,
        f"starts no adapter at singular vectors, which {where}.start asks for": weights.start == "pissa",
        "trains in one process, and several are to train together": ranks > 1,
    }
    return next((reason for reason, given in needs.items() if given), None)


def refuse(reason: str) -> Refused:
    """The error for what this engine does not train."""
    return Refused(
        f"the native engine {reason}", where="engine.train", fix="write train: hf, or leave engine.train out"
    )
