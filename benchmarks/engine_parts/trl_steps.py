"""Trains by TRL's SFTTrainer on rows that are token ids already, to compare its speed and losses with ours."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.models.rendering import Rendered


class TrlSteps(NamedTuple):
    """The seconds and the loss (mean over labels, in nats) of each step, and the model with its adapter, on which
    another call goes on."""

    seconds: list[float]
    losses: list[float]
    model: Any


def trl_steps(
    model: Any, folder: Path, steps: Sequence[Sequence[Rendered]], *, rank: int, rate: float, at_once: int, **how: Any
) -> TrlSteps:
    """Train the steps, one after another.

    model: transformers' module, or what an earlier call returned. folder: holds its tokenizer. steps: the rows of each
    step. rank: of an adapter of all linear layers. rate: the learning rate. at_once: rows that it pads together. how:
    of SFTConfig.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = _now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(_now() - self.began)

    rows = [
        {"input_ids": list(row.ids), "completion_mask": [int(one) for one in row.trained]}
        for step in steps
        for row in step
    ]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=-(-len(steps[0]) // at_once),
            max_length=None,
            num_train_epochs=1,
            learning_rate=rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            completion_only_loss=True,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            **how,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            peft_config=None if hasattr(model, "peft_config") else lora,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        with redirect_stdout(sys.stderr):  # it prints its figures, and stdout is for results
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return TrlSteps(clock.seconds, losses, trainer.model)


def _now() -> float:
    """Seconds since some moment, when the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
