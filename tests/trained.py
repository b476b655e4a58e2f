"""Models under training, for tests: made without a store, trained without a spec."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.batch import Batch, label_count
from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base, base_body
from tunesmith.models.rendering import Rendered
from tunesmith.training import steps
from tunesmith.training.batches.batch_plan import Step
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.estimates.estimate import state_bytes
from tunesmith.training.objectives import CrossEntropy, Objective
from tunesmith.training.schedule import TrainerState
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainer import Trainer

NO_BASE = Base(digest="", folder=Path(), spec="", family="", context_length=0, fingerprint="")


def base_of(folder: Path) -> Base:
    """The base in a folder, as a store would describe it."""
    record = base_body(folder, str(folder)).record({})
    facts = {key: record.body[key] for key in ("family", "context_length", "fingerprint")}
    return Base(digest=record.digest, folder=folder, spec=str(folder), **facts)


def lora_model(network: Network, settings: TrainSettings, base: Base = NO_BASE) -> LoraModel:
    """A LoRA model at its start. base: needed to save it."""
    return LoraModel(base, network, settings, settings.seed)


def full_model(network: Network, settings: TrainSettings, folder: Path) -> FullModel:
    """A model whose weights are trained, at its start. folder: the base's."""
    return FullModel(base_of(folder), network, settings, state_bytes(settings))


def saved(model: TrainableModel, folder: Path) -> Path:
    """A folder with the model's files."""
    folder.mkdir(exist_ok=True)
    model.save(folder)
    return folder


def set_low_rank(lora: LoraModel, std: float) -> None:
    """Draw an adapter's low-rank factors from a normal distribution, always the same."""
    with torch.no_grad():
        for master in lora.masters[:2]:
            master.normal_(std=std, generator=torch.Generator().manual_seed(1))
    lora.parameters_changed()


def batch_loss(model: TrainableModel, batch: Batch, divisor: float) -> torch.Tensor:
    """The cross-entropy of a batch's labels over divisor."""
    return model.loss(batch, torch.full((batch.labels.numel(),), 1 / divisor))


def gradients(model: TrainableModel, step: Step) -> float:
    """Leave a step's gradients on the model's parameters; returns its mean loss."""
    return steps.gradients(model, CrossEntropy(), step)


def validation_loss(model: TrainableModel, batches: Sequence[Batch]) -> float:
    """The mean loss over the labels of batches."""
    return steps.validation_fit(model, batches)["loss"]


def reference_loss(model: torch.nn.Module, rows: Sequence[Rendered]) -> torch.Tensor:
    """The mean loss over all labels by torch alone, rows one at a time: no padding, no shared prefix."""
    total = torch.zeros(())
    for one in rows:
        ids = torch.tensor(one.ids)
        labels = torch.where(torch.tensor(one.trained), ids, -100)
        scores = model(ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(scores[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total / sum(label_count(one) for one in rows)


def fit(
    model: TrainableModel,
    plan: Sequence[Step],
    validation: Sequence[Batch],
    settings: TrainSettings,
    folder: Path,
    progress: Progress = SILENT,
    objective: Objective | None = None,
) -> TrainerState:
    """Train model over a plan, with checkpoints in folder."""
    validate = (lambda: steps.validation_fit(model, validation)) if validation else None
    given = (model, plan, settings, Checkpoints(folder, {}))
    return Trainer(*given, objective=objective or CrossEntropy(), validate=validate, progress=progress).run()
