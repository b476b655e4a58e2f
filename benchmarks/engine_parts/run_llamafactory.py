"""LLaMA-Factory on given rows, by its own Python: python run_llamafactory.py TOLD.json, which prints what was found.

Imports nothing of this project. As documented it trains with gradient checkpointing, which takes less memory and more
time; `checkpointing: false` switches that off. `epochs`, `accumulate`, `schedule`, `warmup` and `shuffle`: one pass in
order with a linear schedule where a recipe does not say otherwise. `end`: where the adapter is saved.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train and print."""
    told = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "WANDB_DISABLED": "true"}
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """When training began and ended, and its losses: loading and tokenising are not in the time."""

        began = ended = computed = 0.0

        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.computed = time.perf_counter(), time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended, self.computed = time.perf_counter(), time.process_time() - self.computed

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        _write_rows(Path(work), told["rows"])
        run_exp(_arguments(work, told), callbacks=[clock])
        if told.get("end"):
            shutil.copytree(Path(work) / "out", told["end"], ignore=shutil.ignore_patterns("checkpoint-*"))
    seconds = clock.ended - clock.began
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": clock.computed,
                "examples_per_second": told.get("epochs", 1) * len(told["rows"]) / seconds,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "first": clock.losses[0],
                "last": clock.losses[-1],
                "losses": clock.losses,
            }
        )
    )


def _write_rows(folder: Path, rows: list[Any]) -> None:
    (folder / "rows.json").write_text(json.dumps([{"messages": row} for row in rows]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "system_tag": "system"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": described}))


def _arguments(work: str, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name_or_path": told["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": told["rank"],
        "lora_alpha": 2 * told["rank"],
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": work,
        "template": "smollm",
        "cutoff_len": 1024,
        "per_device_train_batch_size": told["batch"],
        "gradient_accumulation_steps": told.get("accumulate", 1),
        "learning_rate": told["rate"],
        "lr_scheduler_type": told.get("schedule", "linear"),
        "warmup_ratio": told.get("warmup", 0.0),
        "num_train_epochs": float(told.get("epochs", 1)),
        "bf16": True,
        "use_cpu": True,
        "disable_shuffling": not told.get("shuffle", False),
        "disable_gradient_checkpointing": not told["checkpointing"],
        "output_dir": str(Path(work) / "out"),
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "seed": 0,
    }


if __name__ == "__main__":
    main()
