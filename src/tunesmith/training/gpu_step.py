"""A training step of a tiny random base on the GPU and on the CPU, for `tunesmith doctor --gpu`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.core.messages import Message
from tunesmith.engines.batch import lay_out
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.models.random_llama import random_llama
from tunesmith.models.rendering import Renderer
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, update

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
        found = abs(self.gpu / self.cpu - 1)
        return found if found == found else float("inf")


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
        found = {precision: step(computing_device(), precision) for precision in ACCEPTED}
    return {name: [Figure(key, gpu[key], cpu[key]) for key in cpu] for name, gpu in found.items()}
