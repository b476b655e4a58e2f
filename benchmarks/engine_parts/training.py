"""This project's own trainings: an adapter or every weight, and what its products could reach at most."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_parts.processes import Figures
from engine_parts.rows import base, rendered

RANK, RATE, FULL_RATE = 16, 2e-4, 2e-5


def prepared(rows: Sequence[Any], batch: int, **own: Any) -> tuple[Any, list[list[Any]], Any]:
    """A native trainable model, the steps in the rows' order, the settings."""
    from tunesmith.engines.factory import load_model
    from tunesmith.training.batches.batch_plan import lay_out_steps
    from tunesmith.training.estimates.estimate import state_bytes
    from tunesmith.training.settings import TrainSettings

    found = base()
    settings = TrainSettings(schedule="linear", warmup=0.0, batch=batch, checkpoint_seconds=1e6, **own)
    model = load_model(found).trainable(settings, seed=settings.seed, state_bytes=state_bytes(settings))
    ready = rendered(found.folder, rows)
    plan = [lay_out_steps([ready[start : start + batch]], settings.tokens) for start in range(0, len(ready), batch)]
    return model, plan, settings


def fit(model: Any, plan: list[list[Any]], settings: Any) -> Any:
    """Train over a plan without validation; the state at the end."""
    from tunesmith.training.checkpoints import Checkpoints
    from tunesmith.training.objectives import CrossEntropy
    from tunesmith.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as work:
        return Trainer(model, plan, settings, Checkpoints(Path(work), {}), objective=CrossEntropy()).run()


def adapter_settings(told: Figures) -> dict[str, Any]:
    """Of an adapter as contenders have it."""
    return {"rank": RANK, "learning_rate": told.get("rate", RATE), "seed": told.get("seed", 0)}


def train(told: Figures) -> Figures:
    """told: rows, batch; full, rate, seed where they are not as usual; start and end: where the adapter is
    written before and after."""
    from tunesmith.core.system import machine as memory
    from tunesmith.training.estimates.estimate import trial_step
    from tunesmith.training.objectives import CrossEntropy

    full = told.get("full", False)
    own: dict[str, Any] = {"method": "full", "learning_rate": FULL_RATE} if full else adapter_settings(told)
    model, plan, settings = prepared(told["rows"], told["batch"], **own)
    write(model, told.get("start"))
    memory.reset_peak_memory()
    trial_step(model, CrossEntropy())(plan[0])
    began = time.perf_counter()
    state = fit(model, plan, settings)
    seconds = time.perf_counter() - began
    write(model, told.get("end"))
    losses = [step["loss"] for step in state.curve]
    network, tokens = model.network, sum(len(row.ids) for row in rendered(base().folder, told["rows"]))
    return {
        "examples_per_second": len(told["rows"]) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gb": memory.peak_memory() / 1e9,
        "weights_gb": sum(_bytes(each) for layer in network.layers for each in layer.linear.values()) / 1e9,
        "first": losses[0],
        "last": losses[-1],
        "losses": losses,
        "flops": sum(_flops(network, part) for step in plan for part in step) / seconds,
    }


def write(model: Any, folder: str | None) -> None:
    """Save a model's files, where a folder is named."""
    if folder is not None:
        Path(folder).mkdir(parents=True)
        model.save(Path(folder))


def _bytes(product: Any) -> int:
    return int(getattr(product, "nbytes", 2 * product.numel()))


def _flops(network: Any, batch: Any) -> float:
    """Of the frozen products: forward, and the gradient of each one's input but the first's."""
    linear = [[product.numel() for product in layer.linear.values()] for layer in network.layers]
    each = 2 * sum(map(sum, linear)) - network.layers[0].linear["qkv"].numel()
    return 2.0 * (batch.tokens * each + 2 * batch.labels.numel() * network.head.numel())


def limit(told: Figures) -> Figures:
    """The same products and no more, weights laid out beforehand: the faster of ours and the tensor library's."""
    import torch

    model, plan, _ = prepared(told["rows"], told["batch"], rank=RANK)
    network = model.network
    steps = [part for step in plan for part in step][:4]
    products = list(network.layers[0].linear.values())
    weights = [product.weight for product in products]
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def laid_out(weight: Any) -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(weight, 512) if packs else weight

    def multiply(x: Any, weight: Any) -> None:
        if packs:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        else:
            torch.nn.functional.linear(x, weight)

    ready = [(laid_out(w), laid_out(w.t().contiguous()), w.shape) for w in weights]
    best = 0.0
    for part in steps:
        inputs = [
            (torch.randn(part.tokens, w[1]).bfloat16(), torch.randn(part.tokens, w[0]).bfloat16()) for *_, w in ready
        ]
        library, own = [], []
        for _ in range(12):
            began = time.perf_counter()
            for (x, g), (w, t, _) in zip(inputs, ready, strict=True):
                multiply(x, w)
                multiply(g, t)
            library.append(time.perf_counter() - began)
            began = time.perf_counter()
            for (x, g), product in zip(inputs, products, strict=True):
                product(x)
                product.input_gradient(g)
            own.append(time.perf_counter() - began)
        done = 4.0 * part.tokens * sum(w.numel() for w in weights)
        best = max(best, done / min(statistics.median(library), statistics.median(own)))
    return {"flops": best}
