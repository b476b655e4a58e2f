"""Checks that an export computes what was measured, by comparing log-probabilities.

The reference is the native network with the adapter, in fp32. The texts are the serving engine's greedy answers to
held-out requests. Compared with the reference are the export's files, run by transformers in fp32, and the serving
engine in its own precision.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system import machine as memory
from tunesmith.engines.batch import lay_out
from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import Linear, Network, forward, frozen_linear, logits
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Engine, Generation, Question
from tunesmith.engines.weights import read_model_file
from tunesmith.models.base import Base, loading, read_json, weight_files
from tunesmith.models.export.gguf import FILE as GGUF
from tunesmith.models.export.merging import merged_shards
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import has_whole_model
from tunesmith.records.version import AdapterMoves, Dtype, Equality, ExportDifference, ServedDifference

# Largest and mean difference of a log-probability (nats) that is accepted. Measured on a model of 135M: in fp32, where
# only the order of sums differs, 6e-5 and 7e-6; in bf16, whose weights have 8 bits, 0.35 and 0.04. There, losing 2% of
# the adapter's change adds half of that, and losing 10% three times as much.
TOLERANCE: Mapping[Dtype, Mapping[str, float]] = {
    "fp32": {"max": 2e-3, "mean": 2e-4},
    "bf16": {"max": 1.0, "mean": 0.1},
}
# The serving engine computes in bf16. Accepted is this mean difference over the tokens of the answer that differs most;
# measured on the same model: 0.02.
SERVED_TOLERANCE = 0.1
_SCORED = 4  # answers that the serving engine scores: a server needs a request for each token
_LIKELIEST = 32  # number of tokens that are compared at each place
_UNLIKELY = math.log(0.01)  # tokens with less than this are not compared: they rarely occur in an answer


@dataclass(frozen=True, slots=True)
class Answered:
    """A request with the engine's greedy answer. row: ids of both. ended: whether the engine decoded the end token."""

    messages: tuple[Message, ...]
    text: str
    row: Rendered
    ended: bool


class Places:
    """Log-probabilities at each of an answer's N places.

    answer [N]: of the answer's tokens. tokens, scores [N, K]: the K likeliest tokens and theirs, in descending order.
    """

    def __init__(self, row: Rendered, scores: Tensor) -> None:
        """scores: [N, vocabulary]."""
        labels = torch.tensor(row.ids[-scores.shape[0] :])
        self.answer = scores.gather(1, labels[:, None])[:, 0]
        self.scores, self.tokens = scores.topk(min(_LIKELIEST, scores.shape[1]))


# A conversation, whose answer's tokens are its labels -> log-probabilities [answer, vocabulary], fp32
Scorer = Callable[[Rendered], Tensor]


def answer_probes(
    engine: Engine,
    adapter: str,
    base: Base,
    probes: Sequence[tuple[Message, ...]],
    max_tokens: int,
    progress: Progress,
) -> list[Answered]:
    """The engine's greedy answers to held-out requests as the candidate composes them, as ids of the base's
    tokenizer."""
    renderer = Renderer(base.folder)
    given = engine.generate([Generation(each, max_tokens=max_tokens) for each in probes], adapter, progress)
    return [
        Answered(messages, answer.text, renderer.answered(messages, answer.text), answer.finish == "stop")
        for messages, answer in zip(probes, given, strict=True)
    ]


def compare(
    engine: Engine,
    adapter: str,
    *,
    kind: str,
    base: Base,
    trained: Path,
    form: str,
    exported: Path,
    answered: Sequence[Answered],
    progress: Progress = SILENT,
) -> Equality:
    """How far the export and the serving engine differ from the reference.

    adapter: its name in the engine. kind: of the engine. trained: the training's folder. form: peft, merged, gguf or
    ollama. exported: the export's folder. Raises Refused if the model in fp32 does not fit the memory, or if the export
    has another tokenizer.
    """
    _check_memory(base, models=2 if has_whole_model(trained) else 1)
    check_rendering(form, exported, base, answered)
    rows = [one.row for one in answered]
    with progress.task("comparing forms", 3 * len(answered)) as task:

        def score(scorer: Scorer) -> list[Tensor]:
            scores = []
            for row in rows:
                scores.append(scorer(row))
                task.advance()
            return scores

        network = load_network(base.folder, torch.float32)
        reference = list(map(Places, rows, score(_native(*tuned(trained, network, base)))))
        untuned = _figures(reference, score(_native(network, frozen_linear(network))))
        del network
        gc.collect()
        export = _figures(reference, score(_transformers(form, exported, base)))
    gc.collect()
    return Equality(
        probes=len(answered),
        tokens=sum(sum(row.trained) for row in rows),
        adapter_moves=AdapterMoves(max_difference=untuned.max_difference, mean_difference=untuned.mean_difference),
        export=export,
        served=_served(engine, adapter, answered, reference),
        engine=kind,
    )


def check_rendering(form: str, exported: Path, base: Base, answered: Sequence[Answered]) -> None:
    """Raises Refused if the export's tokenizer or template encodes the probes differently from the base's."""
    if form == "peft":  # the adapter comes without one
        return
    if form == "merged":
        renderer = Renderer(exported)
        if any(renderer.answered(one.messages, one.text) != one.row for one in answered):
            raise Refused("the export's tokenizer encodes a request differently from the base's", where=str(exported))
        return
    from transformers import AutoTokenizer

    # transformers reads a GGUF's tokens and merges, but not how text is split before merging. So compare the tokens.
    theirs = AutoTokenizer.from_pretrained(exported, gguf_file=GGUF)
    ours = Renderer(base.folder).tokenizer
    known = theirs.get_vocab()
    if any(known.get(token) != number for token, number in ours.get_vocab().items()):
        raise Refused("the GGUF's tokens differ from the base's", where=str(exported / GGUF))
    other_template = form == "gguf" and theirs.chat_template != ours.chat_template  # Ollama's is in its Modelfile
    if other_template or theirs.eos_token_id != ours.eos_token_id:
        raise Refused("the GGUF's chat template or end token differs from the base's", where=str(exported / GGUF))


def _figures(reference: Sequence[Places], scores: Sequence[Tensor]) -> ExportDifference:
    """How far an export's log-probabilities [N, vocabulary] of each answer differ from the reference."""
    largest, total, count, equal = 0.0, 0.0, 0, 0
    for expected, given in zip(reference, scores, strict=True):
        difference = (given.gather(1, expected.tokens) - expected.scores).abs()
        difference = difference[expected.scores > _UNLIKELY]
        largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
        total, count = total + float(difference.sum()), count + difference.numel()
        equal += torch.equal(given.argmax(-1), expected.tokens[:, 0])
    if not math.isfinite(largest + total):
        largest = total = math.inf
    return ExportDifference(
        max_difference=_rounded(largest), mean_difference=_rounded(total / max(count, 1)), equal_answers=equal
    )


def _served(
    engine: Engine, adapter: str, answered: Sequence[Answered], reference: Sequence[Places]
) -> ServedDifference:
    """How far the serving engine differs from the reference, in log-probabilities and in greedy answers."""
    scored = answered[:_SCORED]
    questions = [Question(one.messages, (one.text,)) for one in scored]
    largest, equal = 0.0, 0
    for expected, (total,) in zip(reference, engine.choose(questions, adapter), strict=False):
        difference = abs(total - float(expected.answer.sum())) / len(expected.answer)
        largest = max(largest, difference) if math.isfinite(difference) else math.inf
    for one, expected in zip(answered, reference, strict=True):
        answer = torch.tensor(one.row.ids[-len(expected.answer) :])
        # The engine did not choose the end token of an answer that reached max_tokens.
        decoded = len(answer) - (not one.ended)
        equal += torch.equal(answer[:decoded], expected.tokens[:decoded, 0])
    return ServedDifference(scored=len(scored), max_difference=_rounded(largest), equal_answers=equal)


def tuned(folder: Path, network: Network, base: Base) -> tuple[Network, Linear]:
    """The network and linear layers that a training's folder describes: the base's with an adapter, or a new network.

    Raises Refused where the files belong to another base.
    """
    if not has_whole_model(folder):
        return network, adapted_linear(network, read_adapter(folder, network, base))
    own = load_network(base.folder, network.dtype, read_model_file(folder, base, network.repeated))
    return own, frozen_linear(own)


def _native(network: Network, linear: Linear) -> Scorer:
    @torch.inference_mode()
    def score(row: Rendered) -> Tensor:
        batch = lay_out([row])
        hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
        return logits(network, hidden[batch.predicts]).float().log_softmax(-1)

    return score


def _transformers(form: str, exported: Path, base: Base) -> Scorer:
    """Scores by the export, run by transformers in fp32. An adapter is merged into transformers' model of the base."""
    model = _load(form, exported, base).eval()

    @torch.inference_mode()
    def score(row: Rendered) -> Tensor:
        given = model(torch.tensor([row.ids]), logits_to_keep=sum(row.trained) + 1).logits[0, :-1]
        return torch.as_tensor(given).float().log_softmax(-1)

    return score


@loading()
def _load(form: str, exported: Path, base: Base) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if form == "merged":
        return AutoModelForCausalLM.from_pretrained(exported, **plain)
    if form in ("gguf", "ollama"):
        from gguf import GGUFReader

        config = AutoConfig.from_pretrained(exported, gguf_file=GGUF)
        fields = GGUFReader(exported / GGUF).fields
        kind = fields["general.architecture"].contents()
        # The file states it, but transformers does not read it for every architecture.
        config.head_dim = fields[f"{kind}.attention.key_length"].contents()
        given = GgufConfig(gguf_file=GGUF, dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            exported, gguf_file=GGUF, config=config, quantization_config=given, **plain
        )
    model = AutoModelForCausalLM.from_pretrained(base.folder, **plain)
    for _, tensors in merged_shards(base, exported):
        model.load_state_dict(tensors, strict=False)
    return model


def _check_memory(base: Base, models: int) -> None:
    weights = sum(path.stat().st_size for path in weight_files(base.folder))
    stored = read_json(base.folder / "config.json").get("dtype", "float32")
    wanted = int(models * weights * (1.2 if stored == "float32" else 2.4))
    free = memory.available_memory()
    if wanted > free:
        raise Refused(
            f"comparing the export in fp32 needs {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            where="export",
            fix="export on a machine with more memory: an export must be compared first",
        )


def _rounded(value: float) -> float | None:
    """value with six decimals; None if it is not finite."""
    return round(value, 6) if math.isfinite(value) else None
