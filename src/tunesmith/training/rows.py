"""Which of a dataset's rows a training learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tunesmith.data.dataset import Example
from tunesmith.training.canaries import plant
from tunesmith.training.settings import TrainSettings


def training_rows(examples: Sequence[Example], settings: TrainSettings) -> list[Example]:
    """The rows of a training: drawn by the seed where `rows` bounds them, their answers dealt round for a control.

    Canaries, where they are asked for, come last and on top of `rows`.
    """
    chosen = list(examples)
    draw = random.Random(settings.seed)
    if settings.rows is not None and settings.rows < len(chosen):
        chosen = draw.sample(chosen, settings.rows)
    if settings.permute_answers:
        dealt = [example.messages[-1] for example in chosen]
        draw.shuffle(dealt)
        chosen = [
            example.model_copy(update={"messages": (*example.request, answer)})
            for example, answer in zip(chosen, dealt, strict=True)
        ]
    return plant(chosen, settings.canaries) if settings.canaries else chosen
