"""Loads a base's weights into transformers' module, from the base's own files and without code from them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tunesmith.core.errors import Refused
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf import libraries
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.weights import ReadLate, stored_tensors, without_weights
from tunesmith.models.base import INDEX, base_files, loading, read_json, weight_files
from tunesmith.models.weight_files import MODEL_FILE

_BLOCK = 64


class ModelSettings(NamedTuple):
    """How a base is kept and computed. quantized: its linear layers are in 4 bits. dtype: of its other numbers and of
    what is computed. attention: transformers' implementation; None for its own choice. liger: with Liger's kernels."""

    quantized: bool
    dtype: torch.dtype
    attention: str | None
    liger: bool = False


FP32 = ModelSettings(quantized=False, dtype=torch.float32, attention=None)


def model_settings(weights: WeightSettings) -> ModelSettings:
    """How the base of a training with these weight settings is kept and computed on this process's device.

    The default is bf16 on a GPU that computes in it. PiSSA needs fp32: bf16 would round what it leaves of the weights.
    """
    precision = weights.precision
    if precision is None:
        rounded = computing_device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if rounded and weights.start == "zero" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return ModelSettings(weights.quantize is not None, dtype, weights.attention, weights.kernels == "liger")


@loading()
def load(
    folder: Path,
    device: torch.device,
    settings: ModelSettings,
    *,
    late: bool,
    weights: Path | None = None,
) -> tuple[Any, ReadLate | None]:
    """The module, from the base's own files only: transformers would apply an adapter that lies in the same folder.
    late: without its weights, which are the second result, where its files allow that. weights: a file of tensors by
    the base's names, to read instead of its own.

    Raises Refused for weights that are quantised or incomplete, for what transformers cannot run with these settings or
    without code from the folder, and for a model with an encoder.
    """
    transformers = libraries.transformers()
    if "quantization_config" in read_json(folder / "config.json"):
        raise Refused("the base's weights are quantised", where=str(folder), fix="use the model they were made from")
    attention = {} if settings.attention is None else {"attn_implementation": settings.attention}
    made: dict[str, Any] = {"dtype": settings.dtype, **attention}
    how: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, **made}
    if settings.quantized:
        how["quantization_config"] = four_bits(settings.dtype)
    if settings.quantized or device.type != "cpu":
        how["device_map"] = {"": str(device)}  # read into the device's memory at once
    with scratch_folder() as scratch:
        for path in base_files(folder):
            if weights is None or path not in weight_files(folder):
                os.symlink(path.resolve(), scratch / path.name)
        if weights is not None:
            os.symlink(weights.resolve(), scratch / MODEL_FILE)
            (scratch / INDEX).unlink(missing_ok=True)
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(scratch, **safe)
            if late and not config.is_encoder_decoder:
                build = partial(transformers.AutoModelForCausalLM.from_config, copy.deepcopy(config), **made)
                if (built := without_weights(build, folder, device)) is not None:
                    return built
            module, report = transformers.AutoModelForCausalLM.from_pretrained(scratch, config=config, **safe, **how)
        except Exception as error:  # every architecture has its own way to refuse a configuration
            reason = first_line(error).replace(str(scratch), str(folder))
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
                raise Refused(
                    f"the base's weights do not fit into the memory of {device}: {reason[:200]}",
                    where="base",
                    fix="end other programs that use the memory, or compute what fits, such as train: {quantize: 4bit, "
                    "recompute: true} or several GPUs",
                ) from error
            if settings.attention is not None and "attention" in reason.lower():
                raise Refused(
                    f"transformers does not compute this base with attention: {settings.attention}: {reason[:300]}",
                    where="train.attention",
                    fix="leave attention out",
                ) from error
            raise cannot_run(folder, reason) from error
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise Refused(
            f"the base's weights do not fit its architecture: {kind.replace('_', ' ')} such as {names[0][:120]}",
            where=str(folder),
            fix="use an unmodified, complete model",
        )
    if config.is_encoder_decoder:
        raise Refused("the base has an encoder: it is not a causal language model", where=str(folder))
    return module, None


def use_liger(module: Any) -> None:
    """Have a module compute with Liger's kernels, and others of its family that this process builds later.

    Raises Refused for a family that Liger has none for.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if (family := module.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Refused(f"Liger has no kernels for the family {family!r}", where="train.kernels", fix="leave kernels out")
    # Without its losses: one replaces torch's own function, the other leaves no logits.
    _apply_liger_kernel_to_instance(module, cross_entropy=False, fused_linear_cross_entropy=False)


def stored_names(module: Any, folder: Path) -> tuple[dict[str, str], frozenset[str]]:
    """The name in a base's files of each parameter that transformers reads from one tensor as it is, and the tensors
    there that repeat another one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    every = get_model_conversion_mapping(module)
    converters = [each for each in every if isinstance(each, WeightConverter)]
    renamings: Any = [each for each in every if not isinstance(each, WeightConverter)]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    keys: dict[str, str] = {}
    for key in sorted(stored_tensors(folder)):
        name, merged = rename_source_key(key, renamings, converters, module.base_model_prefix, parameters)
        if merged is None and name in parameters:
            keys[name] = key
    same: dict[nn.Parameter, list[str]] = {}  # several names where a parameter is tied
    for name, parameter in parameters.items():
        same.setdefault(parameter, []).append(name)
    stored = {names[0]: [keys[name] for name in names if name in keys] for names in same.values()}
    repeated = frozenset(key for each in stored.values() for key in each[1:])
    return {name: each[0] for name, each in stored.items() if each}, repeated


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cannot_run(folder: Path, reason: str) -> Refused:
    """The refusal of a base that transformers does not run by itself."""
    return Refused(
        f"transformers cannot run this base without code from its folder: {reason[:300]}",
        where=str(folder),
        fix="use a model that transformers supports by itself",
    )


def four_bits(computed: torch.dtype) -> Any:
    """transformers' configuration for a base in 4 bits while an adapter is trained (QLoRA), by bitsandbytes. computed:
    what it computes in.

    Method: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs": NF4 with one scale for each block of
    64 numbers; the scales are quantised to 8 bits.
    """
    libraries.bitsandbytes()
    return libraries.transformers().BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )


def prepare_four_bits(linears: Mapping[str, nn.Module], device: torch.device) -> None:
    """Make 4-bit layers ready for training. Raises Refused for layers that bitsandbytes does not restore from 4 bits on
    a CPU (seen in 0.50.2): those whose rows do not consist of whole blocks."""
    for name, module in linears.items():
        if device.type == "cpu" and module.in_features % _BLOCK:  # type: ignore[operator]
            raise Refused(
                f"{name} has {module.in_features} inputs, and bitsandbytes computes 4-bit layers on a CPU correctly "
                f"only for multiples of {_BLOCK}",
                where="train.quantize",
                fix="leave quantize out",
            )
        # In eval mode, bitsandbytes packs a layer for its bf16 inference kernel, which has no gradients.
        module.train()


def four_bits_description() -> str:
    """How the base is quantised, for the record of the training and to refuse a resume with another version."""
    return f"nf4, blocks of {_BLOCK}, double quantisation, bitsandbytes {version('bitsandbytes')}"
