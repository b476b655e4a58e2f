"""Any other causal language model of transformers', run by its own module: slow, and as correct as that module is.

For families whose arithmetic network.py does not know (GPT-2, GPT-NeoX, OPT, Falcon, Phi-3, ...). Everything is fp32,
without dropout. A low-rank part is added to what a linear layer gives by a hook, so no layer is taken out of the model,
and its name is the one that PEFT knows.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.models.base import Base, base_files
from tunesmith.models.families import matching
from tunesmith.models.weight_files import read_adapter_file

# Families with a running state take this layer's weight past its forward; PEFT refuses it too.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_NOT_ADAPTED = {"out_proj"}
_PROBE = (5, 9, 2, 7, 11, 3, 8, 6)  # any ids do


class Low(NamedTuple):
    """What is added to a linear layer: x a^T b^T times scale. a [r, in], b [out, r]."""

    a: Tensor
    b: Tensor
    scale: float


class HFModel:
    """A frozen model of another family. parts: the low-rank part of each adapted linear layer, by the layer's name;
    whoever sets them decides under which adapter the model runs."""

    def __init__(self, base: Base) -> None:
        """Raises Refused for a model that transformers cannot run, and for one whose tokens see later ones."""
        self.folder = base.folder
        if base.context_length <= 0:
            raise Refused(
                "the base's configuration does not say how long a text it takes",
                where=str(base.folder / "config.json"),
                fix="add max_position_embeddings to it",
            )
        self.module = _load(base.folder)
        self.parts: Mapping[str, Low] = {}
        self._called: set[str] = set()
        head = self.module.get_output_embeddings()
        self.linears = {
            name: module for name, module in self.module.named_modules() if _is_linear(module) and module is not head
        }
        for name, module in self.linears.items():
            module.register_forward_hook(partial(self._add, name))
        self.vocabulary = self._check_causal()

    def _add(self, name: str, _module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        self._called.add(name)
        part = self.parts.get(name)
        return None if part is None else out + part.scale * F.linear(F.linear(given[0], part.a), part.b)

    def targets(self, wanted: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The linear layers that names or patterns mean (`all`: every one but the head), each with its sizes (out, in).

        Raises Refused for a name that no layer has, and for one by which PEFT would adapt more than these.
        """
        spared = _NOT_ADAPTED if self.module.config.model_type in _STATE_SPACE else set()
        known = {_last(name) for name in self.linears} - spared
        names, unknown = matching(wanted, known)
        if unknown:
            raise Refused(
                f"the base has no linear layer that is called {unknown[0]!r}; there are {', '.join(sorted(known))}",
                where="train.targets",
            )
        for name, module in self.module.named_modules():
            if _last(name) in names and name not in self.linears and not list(module.children()):
                raise Refused(
                    f"the name {_last(name)!r} is also that of {name}, which cannot be adapted",
                    where="train.targets",
                    fix="name the layers without it",
                )
        return {name: _sizes(module) for name, module in self.linears.items() if _last(name) in names}

    @torch.no_grad()
    def reached(self) -> set[str]:
        """The linear layers that are called as layers: some models multiply a layer's weight themselves, and an adapter
        does not come there."""
        self._called.clear()
        self.module(input_ids=torch.tensor([_PROBE]), use_cache=False)
        return set(self._called)

    def scores(self, batch: Batch) -> Tensor:
        """Logits [N, vocabulary] at the places of a batch that predict a label.

        Rows are filled up on the right, where nothing that counts looks: no token sees a later one.
        """
        starts = torch.tensor([0, *batch.lengths]).cumsum(0) + batch.prefix
        row_of = torch.bucketize(batch.predicts, starts, right=True) - 1
        place_of = batch.predicts - starts[row_of] + batch.prefix
        # Up to the last place that predicts: what lies behind may exceed the positions that the model has.
        longest = int(place_of.max()) + 1
        ids = torch.zeros(len(batch.lengths), longest, dtype=torch.long)
        for row, (first, length) in enumerate(zip(starts.tolist(), batch.lengths, strict=False)):
            whole = torch.cat([batch.ids[: batch.prefix], batch.ids[first : first + length]])[:longest]
            ids[row, : len(whole)] = whole
        logits: Tensor = self.module(input_ids=ids, use_cache=False).logits
        return logits[row_of, place_of]

    @property
    def multiplied(self) -> int:
        """Numbers of the linear layers and the head."""
        head = self.module.get_output_embeddings().weight.numel()
        return int(head) + sum(out * into for out, into in map(_sizes, self.linears.values()))

    @property
    def widest(self) -> tuple[int, int]:
        """(out, in) of the widest linear layer."""
        return max(map(_sizes, self.linears.values()))

    def kept_bytes(self, batch: Batch) -> int:
        """Bytes that a batch takes at the least: what linear layers read and give, of every token, and its logits, with
        their gradient and what the loss makes of them."""
        tokens = len(batch.lengths) * (batch.prefix + max(batch.lengths))
        each = sum(map(sum, map(_sizes, self.linears.values())))
        return 4 * tokens * (each + 3 * self.vocabulary)

    def read_adapter(self, folder: Path, base: Base) -> dict[str, Low]:
        """The parts of a PEFT folder. Raises Refused where it is another base's, or does not fit its layers."""
        file = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint)
        tensors = {name: torch.from_numpy(tensor) for name, tensor in file.tensors.items()}
        rank = file.rank
        scale = file.alpha / (rank**0.5 if file.root else rank)
        found: dict[str, Low] = {}
        for name, (out, into) in self.targets(sorted(file.targets)).items():
            pair = [tensors.pop(f"base_model.model.{name}.lora_{half}.weight", None) for half in "AB"]
            a, b = pair
            if a is None or b is None or (a.shape, b.shape) != ((rank, into), (out, rank)):
                raise Refused(f"the adapter does not fit the layer {name}", where=str(folder), fix="train it again")
            found[name] = Low(a.float(), b.float(), scale)
        if tensors:
            raise Refused(
                f"the adapter holds tensors no layer takes, such as {sorted(tensors)[0][:120]}", where=str(folder)
            )
        return found

    @torch.no_grad()  # what a module keeps for later must be fit for training
    def _check_causal(self) -> int:
        """How many logits a step has. Raises Refused where a token's logits change with what follows it."""
        ids = torch.tensor([_PROBE])
        other = ids.clone()
        other[0, -1] += 1
        one, two = (self.module(input_ids=each, use_cache=False).logits for each in (ids, other))
        if not torch.allclose(one[:, :-1], two[:, :-1], rtol=1e-4, atol=1e-4):
            raise Refused(
                "the base's tokens see later ones: it is no causal language model",
                where=str(self.folder),
                fix="use a base that writes text from left to right",
            )
        return int(one.shape[-1])

    @cached_property
    def pads(self) -> bool:
        """Whether a row filled up on the left gives the logits it gives alone: models with a running state do not."""
        alone, company = self._steps([_PROBE[:3]]), self._steps([_PROBE[:3], _PROBE])
        return all(torch.allclose(a[0], b[0], rtol=1e-3, atol=1e-3) for a, b in zip(alone, company, strict=True))

    def _steps(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Logits [B, vocabulary] of the first steps behind rows."""
        from transformers import GenerationConfig

        ids, mask = left_padded(rows, 0)
        how = GenerationConfig(
            max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        given = self.module.generate(ids, attention_mask=mask, generation_config=how)
        return tuple(given.logits)


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """ids and attention mask [B, longest], rows ending side by side."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _load(folder: Path) -> Any:
    """The module, from the base's own files and nothing that lies beside them (an adapter there would be applied)."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # transformers would fetch compiled code where it finds `kernels`
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if "quantization_config" in json.loads((folder / "config.json").read_bytes()):
        raise Refused("the base's weights are quantised", where=str(folder), fix="use the base they were made from")
    with tempfile.TemporaryDirectory() as scratch:
        for path in base_files(folder):
            os.symlink(path.resolve(), Path(scratch) / path.name)
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(scratch, **safe)
            how: dict[str, Any] = {**safe, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(scratch, config=config, **how)
        except Exception as error:  # each architecture has its own ways to refuse a configuration
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(scratch, str(folder))
            raise Refused(
                f"transformers cannot run this base without code from its folder: {reason[:300]}",
                where=str(folder),
                fix="use a model that transformers knows by itself",
            ) from error
    module, found = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise Refused(
            f"the base's weights are not its architecture's: {kind.replace('_', ' ')} such as {names[0][:120]}",
            where=str(folder),
            fix="use an unmodified, complete model",
        )
    if config.is_encoder_decoder:
        raise Refused("the base has an encoder: it is no causal language model", where=str(folder))
    module.generation_config = GenerationConfig()  # nothing that would change scores unseen
    return module.eval().requires_grad_(requires_grad=False)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; transformers' Conv1D keeps its weight the other way round."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
