"""A causal language model as transformers' own module, without dropout, with PEFT's adapters in it."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch, Packed
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf import libraries, packing
from tunesmith.engines.hf.costs import LOGITS_AT_ONCE, Shapes, is_experts, is_linear
from tunesmith.engines.hf.loading import FP32, ModelSettings, load, prepare_four_bits, stored_names, use_liger
from tunesmith.engines.hf.sharding import replaced, shard
from tunesmith.engines.ranks import ALONE, Ranks, whole
from tunesmith.engines.settings import match_layers
from tunesmith.engines.weights import to_meta
from tunesmith.models.base import Base, require_context_length
from tunesmith.models.rendering import Rendered
from tunesmith.models.weight_files import AdapterConfig, read_adapter_file

# Models with a running state use this layer's weight without calling the layer, and PEFT refuses to adapt it.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_NOT_ADAPTED = {"out_proj"}
_PROBE = (5, 9, 2, 7, 11, 3, 8, 6)  # token ids to test a model with; any would do
_PROBES = ((5, 9, 2, 7, 11), (5, 3, 8, 6, 4), (5, 9, 7, 2, 10))
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # keeps only what a function reads
_LAYER = re.compile(r"(?P<prefix>.*?)(?P<list>\w+)\.(?P<number>\d+)\.")


class HFModel:
    """A frozen base model and any number of adapters, of which at most one is active at a time.

    module: transformers' module. device: that it computes on. linears: its linear layers except the head, by name.
    shapes: of the base. plain_head: whether the logits are what its head gives, unchanged. attention: transformers'
    name of it. vocabulary: logits of a step. ranks: that the module is sharded over. late: the weights, where they are
    read once the module is sharded. stored: each parameter's name in the base's files, where it is there as the module
    has it. repeated: tensors in the files that repeat another one, as a tied head may.
    """

    def __init__(
        self,
        base: Base,
        settings: ModelSettings = FP32,
        *,
        late: bool = False,
        weights: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        """late: read the weights in shard(), if the files hold them as the module does; until then they are zeros.
        weights: a file of tensors by the base's names, to read instead of its own. device: that computes, by default
        this process's.

        Raises Refused for a base that transformers cannot run without code from its folder or with these settings,
        for incomplete weights, and for a model whose tokens see later ones."""
        self.base, self.settings, self.ranks, self.device = base, settings, ALONE, device or computing_device()
        self._rounding = 50.0 if settings.dtype == torch.bfloat16 else 1.0  # of logits, against fp32
        require_context_length(base)
        self.module, self.late = load(base.folder, self.device, settings, late=late, weights=weights)
        self.stored, self.repeated = stored_names(self.module, base.folder)
        if settings.liger:
            use_liger(self.module)
        self.module.eval().requires_grad_(requires_grad=False)
        # The folder's own could change scores unseen.
        self.module.generation_config = libraries.transformers().GenerationConfig()
        self.attention = str(self.module.config._attn_implementation)
        self.head = self.module.get_output_embeddings()
        self.linears: dict[str, nn.Module] = {
            name: module
            for name, module in self.module.named_modules()
            if is_linear(module) and module is not self.head
        }
        self._experts = [name for name, module in self.module.named_modules() if is_experts(module)]
        self.shapes = Shapes(self.module)
        if settings.quantized:
            prepare_four_bits(self.linears, self.device)
        self._others = [name for name, _ in self.module.named_modules() if name not in self.linears]
        self._peft: Any = None  # PEFT's wrapper around the module, from the first adapter on
        self._names = (f"adapter{number}" for number in count())
        self._turn = threading.RLock()  # held while an adapter is active
        self.vocabulary = self._check_causal()

    def targets(self, wanted: Sequence[str]) -> dict[str, nn.Module]:
        """The linear layers that names or patterns match; `all` matches every one except the head.

        Raises UsageError for a name that no layer has, Refused for one that PEFT would also find elsewhere, and for
        `all` where experts are no linear layers.
        """
        if self._experts and not {"all", "*"}.isdisjoint(wanted):
            raise Refused(
                f"the base is a mixture of experts whose weights are fused ({self._experts[0]}): no adapter "
                "is put there, so `all` would not be all of it",
                where="train.targets",
                fix=f"name the layers to adapt: [{', '.join(sorted({_last(name) for name in self.linears}))}]",
            )
        spared = _NOT_ADAPTED if self.module.config.model_type in _STATE_SPACE else set()
        names = match_layers(wanted, {_last(name) for name in self.linears} - spared, "train.targets")
        if also := next((name for name in self._others if _last(name) in names), None):
            raise Refused(
                f"{also} is not a linear layer, but has the name of one: {_last(also)!r}",
                where="train.targets",
                fix="name the layers to adapt without it",
            )
        return {name: module for name, module in self.linears.items() if _last(name) in names}

    def last_layers(self, number: int) -> tuple[str, tuple[int, ...]]:
        """The name of the module list that holds the decoder's layers, and the numbers of its last ones.

        Raises Refused if the model does not keep its layers in one list.
        """
        lists: dict[str, set[int]] = {}
        for name in self.linears:
            if match := _LAYER.match(name):
                lists.setdefault(match["prefix"] + match["list"], set()).add(int(match["number"]))
        if len(lists) != 1:
            raise Refused("the base does not have one list of layers", where="train.layers", fix="leave layers out")
        ((path, numbers),) = lists.items()
        return _last(path), tuple(sorted(numbers)[-number:])

    def add_adapter(self, adapter: AdapterConfig, start: Literal["zero", "pissa"] = "zero") -> str:
        """Put a new adapter into the module, at PEFT's start weights; returns its name.

        Raises Refused for layers that PEFT does not find or cannot adapt.
        """
        peft, name, targets = libraries.peft(), next(self._names), sorted(adapter.targets)
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            use_rslora=adapter.root,
            use_dora=adapter.dora,
            init_lora_weights="pissa" if start == "pissa" else True,
            target_modules=targets,
            layers_to_transform=None if adapter.layers is None else list(adapter.layers),
            layers_pattern=None if adapter.layers is None else adapter.layers_pattern,
            # Conv1D keeps its weight transposed.
            fan_in_fan_out=any(
                _last(name) in targets and not isinstance(layer, nn.Linear) for name, layer in self.linears.items()
            ),
            task_type="CAUSAL_LM",
        )
        with self._turn, warnings.catch_warnings(action="ignore"):
            try:
                if self._peft is None:
                    self._peft = peft.PeftModel(self.module, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise Refused(
                    f"PEFT cannot adapt {', '.join(targets)} of this base: {_line(error)}", where=str(self.base.folder)
                ) from error
        return name

    def shard(self, ranks: Ranks, *, drawn: Sequence[str] = (), trained: Collection[str] = ()) -> None:
        """Shard the module over the ranks, all of which call this.

        drawn: parts of the names of parameters that start from rank 0's numbers: PiSSA's singular vectors may have
        other signs on another processor. trained: names of the base's parameters that are to be trained.
        """
        if self.late is None:
            self._probe(ranks)
        with torch.no_grad():
            for name, tensor in self.module.named_parameters():
                if any(part in f"{name}." for part in drawn):
                    ranks.spread(tensor)
        if self.late is not None:
            to_meta(self.module)
        for name, tensor in self.module.named_parameters():
            if name in trained:
                tensor.requires_grad_()
        shard(self.module, ranks, self.device)
        self.ranks = ranks
        if self.late is not None:
            self.late(self.module, self.device)
            self._check_causal()
            self._probe(ranks)
            self.module.reshard()  # a forward pass leaves the embeddings and the head whole

    def _probe(self, ranks: Ranks) -> None:
        """Find out by forward passes what the module can do, so that all ranks need equally many from now on."""
        self.packs = not ranks.most(not self.packs)  # or the ranks would have unlike batches
        _ = self.pads  # last, because an attempt to pack may fail within a layer and leave that whole

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out of the module."""
        with self._turn:
            self._peft.delete_adapter(name)

    def load_adapter(self, folder: Path) -> str:
        """Read an adapter's folder into the module; returns its name.

        Raises Refused for another base's adapter, and for one that does not fit this model's layers.
        """
        file = read_adapter_file(folder, base=self.base.digest, fingerprint=self.base.fingerprint)
        if other := next((name for name in self._others if _last(name) in file.config.targets), None):
            raise _misfit(folder, f"{other} is not a linear layer")  # PEFT would fail after it adapted some layers
        peft = libraries.peft()
        name = self.add_adapter(file.config)
        try:
            tensors = {key: torch.from_numpy(value) for key, value in file.tensors.items()}
            report = peft.set_peft_model_state_dict(self._peft, tensors, adapter_name=name)
            missing = [key for key in report.missing_keys if f".{name}" in key]
            if report.unexpected_keys or missing:
                raise _misfit(folder, f"tensors left over or missing: {[*report.unexpected_keys, *missing][0]}")
        except (RuntimeError, Refused) as error:  # PEFT raises RuntimeError for another shape
            self.remove_adapter(name)
            raise error if isinstance(error, Refused) else _misfit(folder, _line(error)) from error
        return name

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Have the module compute with one adapter, or with none, while other threads wait."""
        with self._turn:
            if self.ranks.size > 1:
                # What is together since the last forward pass has the numbers and the adapters of that time.
                self.module.reshard()
            if self._peft is not None and adapter is None:
                self._peft.base_model.disable_adapter_layers()
            elif self._peft is not None:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(adapter)
            yield

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors, by their names in the module."""
        return {name: tensor for name, tensor in self.module.named_parameters() if f".{adapter}." in f"{name}."}

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """An adapter's tensors, by their names in an adapter file; whole ones, for which all ranks call this."""
        with self.using(adapter):
            tensors = libraries.peft().get_peft_model_state_dict(self._peft, adapter_name=adapter)
            return {name: whole(tensor) for name, tensor in tensors.items()}

    def without_start(
        self, adapter: str, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT makes of an adapter's tensors that started at start (PiSSA): an adapter of twice the rank for the
        base."""
        converted = self._peft.base_model.subtract_mutated_init(dict(tensors), adapter, {"state_dict": dict(start)})
        return {**tensors, **converted}

    def label_losses(self, batch: Batch, *, packed: bool = False, recompute: Sequence[nn.Module] = ()) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32.

        More than costs.LOGITS_AT_ONCE labels get their logits in parts, as in torchtune's LinearCrossEntropyLoss, and
        each part's are computed again in the backward pass; except where the family changes what its head gives.
        packed: compute the batch without padding, see `packs`. Otherwise rows are padded on the right. No padding mask
        is needed, because no token sees a later one. recompute: layers to compute again in the backward pass.
        """
        # transformers' own switch for this works only in training mode, in which some layers apply dropout.
        forwards: dict[nn.Module, Callable[..., Any]] = {layer: partial(_again, layer.forward) for layer in recompute}
        with replaced({**forwards, self.head: nn.Identity().forward} if self.plain_head else forwards):
            read = packing.outputs(self.module, batch) if packed else self._padded_outputs(batch)
        labels = batch.labels.to(self.device)
        if len(labels) <= LOGITS_AT_ONCE or not self.plain_head:
            return self._losses(read, labels)
        parts = zip(read.split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE), strict=True)
        return torch.cat([_again(self._losses, *part) for part in parts])

    def _padded_outputs(self, batch: Batch) -> Tensor:
        """What the module gives [N, ...] at the places of a batch that predict a label, with rows padded."""
        rows = Packed(batch, self.device)
        first = rows.ids[:, : rows.prefix].expand(len(rows.padded), -1)
        given = self.module(input_ids=torch.cat([first, rows.ids[0, rows.padded]], 1), use_cache=False).logits
        place, longest = rows.real[rows.predicts - rows.prefix], rows.padded.shape[1]
        picked: Tensor = given[place // longest, rows.prefix + place % longest]
        return picked

    def _losses(self, read: Tensor, labels: Tensor) -> Tensor:
        """read: what the head reads [N, width]; where the family changes what its head gives, logits."""
        logits = self.head(read) if self.plain_head else read
        return F.cross_entropy(logits.float(), labels, reduction="none")

    @torch.no_grad()  # what a module caches on its first call must be usable in training
    def _check_causal(self) -> int:
        """How many logits a step has. Raises Refused if a token's logits change with the token after it. Also finds out
        whether the logits are just what the head gives (plain_head): some families cap or scale that."""
        ids = torch.tensor([_PROBE], device=self.device)
        other = ids.clone()
        other[0, -1] += 1
        given: list[Tensor] = []
        hook = nn.Identity() if self.head is None else self.head
        with hook.register_forward_hook(lambda _head, _read, logits: given.append(logits)):
            one, two = (self.module(input_ids=each, use_cache=False).logits for each in (ids, other))
        if not torch.allclose(one[:, :-1], two[:, :-1], rtol=1e-4 * self._rounding, atol=1e-4 * self._rounding):
            raise Refused(
                "the base's tokens see later ones: it is not a causal language model",
                where=str(self.base.folder),
                fix="use a base that writes text from left to right",
            )
        self.plain_head = len(given) == 2 and torch.equal(given[1].to(two.dtype), two)
        return int(one.shape[-1])

    def uncalled(self, adapter: str) -> list[str]:
        """The adapter's layers that the model does not call: some multiply with a layer's weight themselves, and then
        the adapter has no effect."""
        parameters = self.adapter_parameters(adapter)
        with self.using(adapter), torch.enable_grad():
            self.module(input_ids=torch.tensor([_PROBE], device=self.device), use_cache=False).logits.sum().backward()
        unused = [name.split(".lora_B.")[0] for name, tensor in parameters.items() if tensor.grad is None]
        for tensor in parameters.values():
            tensor.grad = None
        return [name for name in unused if name in self.linears]

    @cached_property
    def pads(self) -> bool:
        """Whether a row that is padded on the left gives the same logits as alone: not so for every running state."""
        with self.using(None):
            alone, together = self._first_steps([_PROBE[:3]]), self._first_steps([_PROBE[:3], _PROBE])
        most = 1e-3 * self._rounding
        return all(torch.allclose(a[0], b[0], rtol=most, atol=most) for a, b in zip(alone, together, strict=True))

    @cached_property
    def packs(self) -> bool:
        """Whether rows without padding between them, and with their common prefix computed once, give the same logits
        as alone. Not so where a running state goes on from row to row, where places come from no argument (ALiBi), and
        for eager attention. From then on, the module has an attention that can do so. Flash attention, which can by
        itself, is given rows without a common prefix."""
        with self.using(None), torch.no_grad():
            rows = [Rendered(row, (False,) * 2 + (True,) * 3) for row in _PROBES]
            return packing.enable(self.module, rows, exact=1e-3 * self._rounding)

    @torch.no_grad()
    def _first_steps(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Logits [B, vocabulary] of the first three steps after rows, which go on with the same token: of two equally
        likely ones, rounding would choose another in each batch."""
        ids, mask = left_padded(rows, 0, self.device)
        how = libraries.transformers().GenerationConfig(
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        how_on = {"generation_config": how, "prefix_allowed_tokens_fn": lambda *_: [_PROBE[-1]]}
        return tuple(self.module.generate(ids, attention_mask=mask, **how_on).logits)


def left_padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, longest] of rows that end together."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def _misfit(folder: Path, reason: str) -> Refused:
    return Refused(
        f"the adapter does not fit the base's layers: {reason}",
        where=str(folder),
        fix="train it again",
    )


def _line(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:300]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
