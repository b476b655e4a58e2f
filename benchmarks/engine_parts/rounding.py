"""What rounding costs: the loss on the next rows after one AdamW step, from the same start."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_parts.processes import Figures
from engine_parts.rows import base, rendered
from engine_parts.training import RANK, RATE, fit, prepared, write


def step(told: Figures) -> Figures:
    """told: rows of two steps, batch."""
    from tunesmith.training.steps import validation_fit

    model, plan, settings = prepared(told["rows"], told["batch"], rank=RANK, learning_rate=RATE)
    before = validation_fit(model, plan[1])["loss"]
    fit(model, plan[:1], settings)
    return {"before": before, "after": validation_fit(model, plan[1])["loss"]}


def peft_step(told: Figures) -> Figures:
    """The same step by PEFT and transformers; told: bits as well."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model_at_start, _, _ = prepared(told["rows"], told["batch"], rank=RANK)
    found, bits, batch = base(), told["bits"], told["batch"]
    with tempfile.TemporaryDirectory() as scratch:
        start = str(Path(scratch) / "start")
        write(model_at_start, start)
        plain = AutoModelForCausalLM.from_pretrained(
            found.folder, dtype=torch.float32 if bits == 32 else torch.bfloat16
        )
        model = PeftModel.from_pretrained(plain, start, is_trainable=True)
    ready = rendered(found.folder, told["rows"])

    def loss(rows: Sequence[Any], learn: bool) -> float:
        labels, total = sum(sum(row.trained[1:]) for row in rows), 0.0
        for row in rows:
            ids = torch.tensor(row.ids)
            wanted = torch.where(torch.tensor(row.trained), ids, -100)[1:]
            with torch.set_grad_enabled(learn), torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
                scores = model(ids[None]).logits[0, :-1]
            one = torch.nn.functional.cross_entropy(scores.float(), wanted, ignore_index=-100, reduction="sum") / labels
            if learn:
                one.backward()
            total += float(one.detach())
        return total

    before = loss(ready[batch:], learn=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss(ready[:batch], learn=True)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0).step()
    return {"before": before, "after": loss(ready[batch:], learn=False)}
