"""Tiny random models of each supported family, with a real tokenizer and chat template, for unit tests."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tunesmith.core.messages import Message
from tunesmith.models.rendering import LossOn, Renderer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's for hybrid models: the last answer begins with an empty thought, and without thoughts so does the opening.
HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# Sizes that a processor's tiles multiply: real models have such alone.
TILED = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # whole blocks of 4-bit numbers
FAMILIES = {
    "llama": lambda **k: transformers.LlamaConfig(**k),
    "llama-untied": lambda **k: transformers.LlamaConfig(**{**k, "tie_word_embeddings": False}),
    "llama-rope3": lambda **k: transformers.LlamaConfig(
        **k,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda **k: transformers.MistralConfig(**k, sliding_window=None),
    "qwen2": lambda **k: transformers.Qwen2Config(**k, use_sliding_window=False),
    "qwen3": lambda **k: transformers.Qwen3Config(**k, use_sliding_window=False),
    # Windows shorter than the tests' rows, and so short that some reach into a shared prefix and some do not.
    "mistral-window": lambda **k: transformers.MistralConfig(**k, sliding_window=7),
    "qwen2-window": lambda **k: transformers.Qwen2Config(
        **k, use_sliding_window=True, sliding_window=11, max_window_layers=1
    ),
    "smollm3": lambda **k: transformers.SmolLM3Config(**k, no_rope_layers=[1, 0, 1]),
    "gemma": lambda **k: transformers.GemmaConfig(**k),
    # Caps so small that they bend the scores of random weights.
    "gemma2": lambda **k: transformers.Gemma2Config(
        **k,
        sliding_window=9,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    ),
    "gemma3": lambda **k: transformers.Gemma3TextConfig(
        **k,
        sliding_window=9,
        query_pre_attn_scalar=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def write_model(
    folder: Path, family: str = "llama", seed: int = 0, template: str = TEMPLATE, sizes: Mapping[str, Any] = SIZES
) -> Path:
    """A folder with random fp32 weights, tokenizer and template; returns it."""
    return write_random(folder, FAMILIES[family], seed, template, **sizes)


def write_random(folder: Path, config: Callable[..., Any], seed: int, template: str, **sizes: Any) -> Path:
    """The same of any configuration of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, template)
    torch.manual_seed(seed)
    settings = config(vocab_size=size, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):  # norms and biases too: a weight of exactly one or zero hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def row(request: str, answer: str, system: str = "Be brief.") -> tuple[Message, ...]:
    """A conversation of three turns."""
    return (
        Message(role="system", content=system),
        Message(role="user", content=request),
        Message(role="assistant", content=answer),
    )


ROWS = [
    row("turn on the kitchen light", '{"intent":"on"}'),
    row("turn off", '{"intent":"off","slots":{"area":"hall"}}'),
    row("is the door locked?", '{"intent":"state"}'),
]


def learned(renderer: Renderer, turns: Sequence[Message], loss_on: LossOn = "assistant") -> str:
    """The text of a conversation's tokens that are trained on."""
    made = renderer.conversation(turns, loss_on)
    return renderer.text([token for token, label in zip(made.ids, made.trained, strict=True) if label])


def write_tokenizer(folder: Path, template: str) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["turn on the kitchen light", '{"intent":"on","slots":{}}'] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
            }
        )
    )
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab_size()
