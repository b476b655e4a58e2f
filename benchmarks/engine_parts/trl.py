"""TRL with PEFT and transformers, as a peer: as documented, and at what is fastest of its settings here."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_parts.processes import KEEP_PAGES, Contender, Failed, Figures, installed, measured
from engine_parts.rows import base, rendered
from engine_parts.training import FULL_RATE, RANK, RATE

# How TRL may lay rows out. Packs are as long as a step's rows are together, one pack a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free, sdpa": {"padding_free": True, "attention": "sdpa"},
    "padding-free, eager": {"padding_free": True, "attention": "eager"},
    "packed, sdpa": {"packing": True, "attention": "sdpa"},
    "packed, eager": {"packing": True, "attention": "eager"},
}
_AGREES = 0.02  # how far the loss of the same eight rows may be from that of padded ones, as a share


def described() -> str:
    """The peer's name with its versions."""
    return f"TRL {installed('trl')} + PEFT {installed('peft')}"


def contender(rows: list[Any], batch: int, name: str = "trl", *, kept: bool = False, **told: Any) -> Contender:
    """kept: with pages kept by malloc, which alone makes it faster."""
    environment = KEEP_PAGES if kept else {}
    return Contender(name, lambda: measured("trl", {"rows": rows, "batch": batch, **told}, environment))


def fastest(rows: list[Any], batch: int) -> dict[str, Any]:
    """Which of SETTINGS has the most examples/s on a few rows, among those whose loss is that of padded rows."""
    few, eight = rows[: 3 * batch], rows[:8]
    found: dict[str, float] = {}
    wanted = measured("trl", {"rows": eight, "batch": 8})["first"]
    for name, own in SETTINGS.items():
        try:
            loss = measured("trl", {"rows": eight, "batch": 8, **own})["first"]
            if abs(loss / wanted - 1) > _AGREES:
                print(f"  TRL {name}: loss {loss:.4f} where padded rows have {wanted:.4f}: not used", flush=True)
                continue
            found[name] = measured("trl", {"rows": few, "batch": batch, **own}, KEEP_PAGES)["examples_per_second"]
            print(f"  TRL {name}: {found[name]:.2f} examples/s on {len(few)} rows, loss {loss:.4f}", flush=True)
        except Failed as failure:
            print(f"  TRL {name} does not run here: {str(failure).strip().splitlines()[-1][:200]}", flush=True)
    best = max(found, key=lambda name: found[name])
    return {"name": best, **SETTINGS[best]}


def train(told: Figures) -> Figures:
    """told: rows, batch; full, rate, packing, padding_free, attention where they are not as documented; rank, alpha,
    dropout, epochs, sampling where a recipe has others than one pass in order; start: folder of the adapter to begin
    with; end: where to save it; labels: learn the tokens that we learn (by itself it learns also the line feed that the
    template has behind an answer)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows, batch, full, packing = told["rows"], told["batch"], told.get("full", False), told.get("packing", False)
    folder = base().folder
    ready = rendered(folder, rows)
    tokens = sum(len(row.ids) for row in ready)
    if told.get("labels"):
        given = [{"input_ids": list(row.ids), "completion_mask": [int(one) for one in row.trained]} for row in ready]
    else:
        given = [{"prompt": row[:-1], "completion": row[-1:]} for row in rows]
    data = Dataset.from_list(given)
    options: dict[str, Any] = {"dtype": "float32"} if full else {}
    if told.get("attention"):
        options["attn_implementation"] = told["attention"]
    rank, epochs = told.get("rank", RANK), told.get("epochs", 1)
    lora = LoraConfig(
        r=rank,
        lora_alpha=told.get("alpha", 2 * rank),
        target_modules="all-linear",
        lora_dropout=told.get("dropout", 0.0),
        task_type="CAUSAL_LM",
    )
    model: Any = str(folder)
    if told.get("start"):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **options)
        model = PeftModel.from_pretrained(plain, told["start"], is_trainable=True)
        options = {}
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work,
            per_device_train_batch_size=1 if packing else batch,
            max_length=_length(told, tokens),
            packing=packing,
            padding_free=told.get("padding_free", False),
            bf16=True,
            use_cpu=True,
            num_train_epochs=epochs,
            learning_rate=told.get("rate", FULL_RATE if full else RATE),
            model_init_kwargs=options or None,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            completion_only_loss=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            train_sampling_strategy=told.get("sampling", "sequential"),
            seed=0,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            peft_config=None if full or told.get("start") else lora,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        began, computed = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, computed = time.perf_counter() - began, time.process_time() - computed
        if told.get("end"):
            trainer.model.save_pretrained(Path(told["end"]))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": seconds,
        "cpu_seconds": computed,
        "examples_per_second": epochs * len(rows) / seconds,
        "tokens_per_second": epochs * tokens / seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "first": losses[0],
        "last": losses[-1],
        "losses": losses,
    }


def _length(told: Figures, tokens: int) -> int | None:
    """What TRL is told to be the longest: of a pack, what a step's rows have together; padding-free it takes none."""
    if told.get("packing"):
        return -(-tokens * told["batch"] // len(told["rows"]))
    return None if told.get("padding_free") else 1024
