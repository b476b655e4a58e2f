"""Full fine-tuning in transformers' module: every weight of the base, or all weights of its last layers."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.engines.hf.costs import is_linear
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.ranks import ALONE, Ranks, whole
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.engines.weights.whole_model import save_model


class FullTrainable(HFTrainable):
    """Implements engines.training_protocol.TrainableModel.

    The optimiser moves fp32 master weights. Where the module computes in fp32, they are its own parameters. Where it
    computes in bf16, they start at its rounded weights, and after each step they are rounded into them.
    """

    replaces_base = True

    def __init__(self, model: HFModel, settings: WeightSettings, *, ranks: Ranks = ALONE) -> None:
        """With several ranks, the model is sharded over them.

        Raises Refused for weights that the base's files do not hold as the module does, and where several ranks would
        train weights of two dtypes.
        """
        super().__init__(model, settings)
        trained = _trained(model, settings.layers)
        if renamed := next((name for name in trained if name not in model.stored), None):
            raise Refused(
                f"transformers makes {renamed} out of other tensors of the base's files, and method: full writes "
                "those that it trains under the names that they have there",
                where="train.method",
                fix="leave method out, and name the layers to adapt in targets where experts are fused",
            )
        if ranks.size > 1 and len({each.dtype for each in trained.values()}) > 1:
            raise Refused(
                "the base keeps some weights in fp32, and fully_shard reduces gradients of one dtype only",
                where="train.precision",
                fix="set precision: fp32, or train in one process, without torchrun",
            )
        if ranks.size > 1:
            model.shard(ranks, trained=trained.keys())
            trained = {name: each for name, each in model.module.named_parameters() if name in trained}
        self.parameters = trained
        self._masters: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            parameter.requires_grad_()
            self._masters[name] = parameter if parameter.dtype == torch.float32 else parameter.detach().float()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Matrices, to which weight decay applies; norms and biases, to which it does not."""
        groups = [[each for each in self._masters.values() if (each.dim() > 1) is decays] for decays in (True, False)]
        return [ParameterGroup(groups[0]), ParameterGroup(groups[1], weight_decay=False)]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients to the master weights' in fp32, and zeros where no token reached a weight."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if (master := self._masters[name]) is not parameter:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def parameters_changed(self) -> None:
        """Round the master weights into the module's."""
        for name, parameter in self.parameters.items():
            if (master := self._masters[name]) is not parameter:
                parameter.copy_(master)

    def save(self, folder: Path) -> None:
        """Write model.safetensors into an existing folder: the base's weights with the trained ones in their place.

        All ranks call this. Tensors are brought together one by one, and rank 0 keeps them on the CPU and writes.
        Raises TunesmithError where no weight differs from the base's after rounding.
        """
        model = self._model
        weights = ((model.stored[name], whole(master.detach())) for name, master in self._masters.items())
        if model.ranks.first:
            save_model(weights, model.base, folder, model.repeated)
        else:
            deque(weights, maxlen=0)

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's matrix products: 2 more for each trained number and token."""
        tokens, scored = self._computed(batch)
        linear = (each for each in self._model.module.modules() if is_linear(each) and each.weight.requires_grad)
        learned = (each.weight.numel() * (scored if each is self._model.head else tokens) for each in linear)
        return super().flops(batch) + 2.0 * float(sum(learned))

    def _gradient_numbers(self) -> int:
        fp32 = all(each is self.parameters[name] for name, each in self._masters.items())
        return super()._gradient_numbers() * (2 if fp32 else 3) // 2


def _trained(model: HFModel, last: int | None) -> dict[str, nn.Parameter]:
    """The parameters to train, by name: all, or those of the last layers."""
    every = dict(model.module.named_parameters())
    if last is None:
        return every
    path, numbers = model.last_layers(last)
    return {name: each for name, each in every.items() if any(f".{path}.{number}." in f".{name}" for number in numbers)}
