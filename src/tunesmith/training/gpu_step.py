"""A training step of a tiny random base on the GPU and on the CPU, for `tunesmith doctor --gpu`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.core.digests import digest_of
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.engines.batch import lay_out
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, update

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")
# Every engine computes these heads and this vocabulary; the weights are so large that answers depend on what is read.
_SHAPE: JsonObject = {
    "vocab_size": 320, "max_position_embeddings": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
    "tie_word_embeddings": False, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def random_llama(folder: Path) -> Base:
    """Write a small Llama with random weights, a byte tokenizer and a chat template into an existing folder.

    Its weights are the same every time.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), (*_SPECIAL, _SPECIAL[1]), strict=True))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_SHAPE)).save_pretrained(folder)
    return Base(
        digest=digest_of({"random": _SHAPE}),
        folder=folder,
        spec="random Llama",
        family="llama",
        context_length=_SHAPE["max_position_embeddings"],
        fingerprint=digest_of(_TEMPLATE),
    )


# Largest relative differences to the CPU's fp32 that are accepted.
ACCEPTED = {"fp32": 1e-3, "bf16": 0.05}
_CONVERSATION = (Message(role="user", content="is the light on?"), Message(role="assistant", content='{"light": true}'))


class Figure(NamedTuple):
    """One figure of a step, on the GPU and on the CPU."""

    name: str
    gpu: float
    cpu: float

    @property
    def difference(self) -> float:
        """The relative difference; infinite where the GPU's figure is not a number."""
        share = abs(self.gpu / self.cpu - 1)
        return share if share == share else float("inf")


def compare_step() -> dict[str, list[Figure]]:
    """For each precision of the GPU the loss of a step, its gradient's norm, and the loss after it."""
    with tempfile.TemporaryDirectory() as folder:
        base = random_llama(Path(folder))
        batch = lay_out([Renderer(base.folder).conversation(_CONVERSATION)], share=False)

        def step(device: torch.device, precision: str) -> dict[str, float]:
            settings = TrainSettings.model_validate({"rank": 8, "learning_rate": 1e-3, "precision": precision})
            model = LoadedHFModel(base, device).trainable(settings, seed=0, state_bytes=16)
            with torch.no_grad():
                for group in model.parameter_groups():  # devices draw other numbers
                    for tensor in group.tensors:
                        tensor.copy_(torch.linspace(-0.05, 0.05, tensor.numel()).view(tensor.shape))
            model.parameters_changed()
            loss, optimizer = gradients(model, CrossEntropy(), [batch]), make_optimizer(model, settings)
            norm = update(model, optimizer, settings.learning_rate, clip=1e9)
            return {"loss": loss, "gradient": norm, "loss after it": float(model.label_losses(batch).mean())}

        cpu = step(torch.device("cpu"), "fp32")
        figures = {precision: step(computing_device(), precision) for precision in ACCEPTED}
    return {name: [Figure(key, gpu[key], cpu[key]) for key in cpu] for name, gpu in figures.items()}
