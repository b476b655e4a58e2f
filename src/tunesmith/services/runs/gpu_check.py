"""Checks that training, export and vLLM work on this machine's GPU, and measures what they cost. Downloads nothing."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.processes import end_with_parent
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.core.text.display import json_text
from tunesmith.core.view import View
from tunesmith.engines.device import computing_device, device_name, gpu_present
from tunesmith.models.base import cache_folder
from tunesmith.services.doctor import installed_version

if TYPE_CHECKING:
    from tunesmith.training.gpu_check.found import Found

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "vllm")


class CheckResult(View):
    """What came of a check. detail: what was found, what is wrong, or why it was left out. figures: what was measured,
    in bytes, tokens and floating-point operations a second, and nats."""

    name: str
    outcome: Literal["passed", "failed", "left out"]
    detail: str
    seconds: float
    figures: dict[str, float]


class GpuCheck(View):
    """Every check. ok: none failed. gpu: the card's name; None where the checks ran on a CPU, so that no GPU was
    measured. libraries: the versions that are installed."""

    ok: bool
    gpu: str | None
    libraries: dict[str, str | None]
    checks: list[CheckResult]


def gpu_check(*, vllm: str = "vllm serve", output: Path | None = None, progress: Progress = SILENT) -> GpuCheck:
    """Run every check, one after another; one that fails does not end the others. On a GPU, where an error may leave a
    process that cannot compute any more, each check has a process of its own.

    vllm: the command that starts vLLM. output: also write the result there, as JSON.
    """
    gpu, found = gpu_present(), list[CheckResult]()
    checks = _checks(vllm)
    with scratch_folder(_made(cache_folder())) as work, progress.task("checking", len(checks)) as task:
        for name, check in checks.items():
            task.note(name)
            found.append(_apart(name, check, work) if gpu else perform(name, check, work))
            task.advance()
    result = GpuCheck(
        ok=all(each.outcome != "failed" for each in found),
        gpu=device_name(computing_device()) if gpu else None,
        libraries={name: installed_version(name) for name in _LIBRARIES},
        checks=found,
    )
    if output is not None:
        write_atomic(output, f"{json_text(result.document())}\n".encode())
    return result


def _checks(command: str) -> Mapping[str, Callable[[Path], Found]]:
    """Every check by its name."""
    from tunesmith.training.gpu_check import checks, speed

    return {
        "parity with the native engine, fp32": partial(checks.parity, precision="fp32"),
        "parity with the native engine, bf16": partial(checks.parity, precision="bf16"),
        "kill -9 and resume": checks.resume,
        "QLoRA": checks.qlora,
        "export": checks.export,
        "vLLM": partial(checks.vllm, command=command),
        "tiny, answers with the static cache": partial(checks.answers, shape="tiny"),
        "1B, answers with the static cache": partial(checks.answers, shape="1B"),
        "tiny, LoRA, rows of 128 tokens": partial(speed.speed, shape="tiny", quantize=None),
        "1B, LoRA, rows of 2,048 tokens": partial(speed.speed, shape="1B", quantize=None),
        "1B, LoRA, rows of 16 to 512 tokens": partial(speed.speed, shape="1B", quantize=None, mixed=True),
        "8B, LoRA, rows of 2,048 tokens": partial(speed.speed, shape="8B", quantize=None),
        "8B, QLoRA, rows of 2,048 tokens": partial(speed.speed, shape="8B", quantize="4bit"),
    }


def perform(name: str, check: Callable[[Path], Found], work: Path) -> CheckResult:
    """Run one check in this process."""
    from tunesmith.training.gpu_check.found import LeftOut

    began = time.monotonic()
    outcome: Literal["passed", "failed", "left out"] = "failed"
    figures: Mapping[str, float] = {}
    try:
        detail, figures = check(work)
        outcome = "passed"
    except LeftOut as error:
        detail, outcome = str(error), "left out"
    except Exception as error:  # noqa: BLE001 - whatever breaks is what the check has found
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    seconds = round(time.monotonic() - began, 1)
    return CheckResult(name=name, outcome=outcome, detail=detail, seconds=seconds, figures=dict(figures))


def _apart(name: str, check: Callable[[Path], Found], work: Path) -> CheckResult:
    """Run one check in a new process."""
    context, began = multiprocessing.get_context("spawn"), time.monotonic()
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=perform_in_child, args=(send, os.getpid(), name, check, work))
    child.start()
    send.close()
    try:
        result = CheckResult.model_validate(receive.recv())
    except EOFError:
        result = None
    child.join()
    if result is not None:
        return result
    detail, seconds = f"its process ended with exit code {child.exitcode}", round(time.monotonic() - began, 1)
    return CheckResult(name=name, outcome="failed", detail=detail, seconds=seconds, figures={})


def perform_in_child(send: Connection, parent: int, name: str, check: Callable[[Path], Found], work: Path) -> None:
    """Run one check in this process, which ends with its parent, and send what came of it."""
    end_with_parent(parent)
    send.send(perform(name, check, work).model_dump())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
