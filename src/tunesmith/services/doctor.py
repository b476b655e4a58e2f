"""Checks of this machine and of a project: what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tunesmith.core.errors import NextStep, Refused, TunesmithError
from tunesmith.core.system import machine as memory
from tunesmith.core.system.machine import wanted_threads
from tunesmith.core.view import View
from tunesmith.project import Project

# For quantize: 4bit, attention: flash_attention_2, and clusters.
_EXTRAS = ("bitsandbytes", "flash-attn", "liger-kernel", "ray")


class Check(View):
    """One thing that was checked. fix: what to do where it is not ok."""

    name: str
    ok: bool
    detail: str
    fix: NextStep | None = None


class Checks(View):
    """Every check. ok: whether all of them are."""

    ok: bool
    checks: tuple[Check, ...]


def examine(directory: Path) -> Checks:
    """Check this machine, the project, its base, its store, its audit log, and whether its champions may serve."""
    checks = (_python, _processor, _gpus, _extras, _memory, _cache, _disk, _project, _base, _store, _champions)
    found = tuple(_checked(check, directory) for check in checks)
    return Checks(ok=all(check.ok for check in found), checks=found)


def examine_gpu() -> Checks:
    """Compute a training step of a tiny random base on the GPU and on the CPU, and compare its figures. Downloads
    nothing. Raises Refused where torch sees no GPU."""
    from tunesmith.engines.device import computing_device, describe_gpus, device_name, gpu_present
    from tunesmith.training.gpu_step import ACCEPTED, compare_step

    described, fix = describe_gpus()
    if not gpu_present():
        fix = fix or "run it on a machine with a GPU and a build of PyTorch for it"
        raise Refused(f"torch sees no GPU ({described})", where="gpu", fix=fix)
    found = [_check("gpu", device_name(computing_device()))]
    for precision, figures in compare_step().items():
        most = max(figure.difference for figure in figures)
        said = "; ".join(f"{each.name} {each.gpu:.6g}, on the CPU {each.cpu:.6g}" for each in figures)
        accepted = ACCEPTED[precision]
        detail = f"{said}: they differ by at most {most:.1e} (accepted: {accepted:g})"
        fix = "try another driver or build of PyTorch: what this GPU trains is not what the CPU would"
        found.append(_check(f"a step in {precision}", detail, most <= accepted, fix))
    return Checks(ok=all(check.ok for check in found), checks=tuple(found))


def _installed_version(name: str) -> str | None:
    """The version of a package in this environment; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _checked(check: Callable[[Path], Check], directory: Path) -> Check:
    try:
        return check(directory)
    except TunesmithError as error:
        where = f" ({error.where})" if error.where else ""
        return _check(check.__name__.strip("_"), f"{error.what}{where}", False, error.fix)


def _check(name: str, detail: str, ok: bool = True, fix: str | None = None) -> Check:
    return Check.model_validate({"name": name, "ok": ok, "detail": detail, "fix": None if ok else fix})


def _python(_directory: Path) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _check("python", version, sys.version_info >= (3, 11), "install Python 3.11 or newer")


def _processor(_directory: Path) -> Check:
    from tunesmith.engines.factory import describe_processor

    threads = wanted_threads()
    limit = "" if threads is None else f"; TUNESMITH_THREADS: {threads}"
    return _check("processor", describe_processor() + limit)


def _gpus(_directory: Path) -> Check:
    from tunesmith.engines.device import describe_gpus

    found, wrong = describe_gpus()
    return _check("gpus", found, wrong is None, wrong)


def _extras(_directory: Path) -> Check:
    """Which libraries are there that only some settings need."""
    found = (f"{name} {_installed_version(name) or '(not installed)'}" for name in _EXTRAS)
    return _check("extras", ", ".join((*found, f"vllm {shutil.which('vllm') or '(not on PATH)'}")))


def _memory(_directory: Path) -> Check:
    free = memory.available_memory()
    return _check("memory", f"{free / 1e9:.1f} GB free", free > 3 << 30, "training a 135M model takes 3 GB")


def _cache(_directory: Path) -> Check:
    from tunesmith.models.base import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return _check("cache", str(folder), os.access(folder, os.W_OK), "set TUNESMITH_CACHE to a folder of yours")


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    return _check("disk", f"{free / 1e9:.1f} GB free", free > 2 << 30, "free some space for weights and checkpoints")


def _project(directory: Path) -> Check:
    project = Project.load(directory)
    return _check("project", f"{project.settings.name}, {len(project.settings.candidates)} candidates")


def _base(directory: Path) -> Check:
    """Which engine runs a base in a local folder. Downloads nothing."""
    from tunesmith.engines.settings import SLOW, is_native

    project = Project.load(directory)
    config = project.root / project.settings.base / "config.json"
    if not config.is_file():
        return _check("base", project.settings.base)
    family = str(json.loads(config.read_bytes()).get("model_type"))
    return _check("base", f"{family}, on the native engine" if is_native(family) else f"{family}, which {SLOW}")


def _store(directory: Path) -> Check:
    from tunesmith.store import audit, database
    from tunesmith.store.people.trust import TRUST_KEY

    project = Project.load(directory)
    if not project.store.is_made:
        return _check("store", "not made yet: a run makes it")
    with database.reading(project.store.engine) as session:
        problems = audit.verify(session)
    if problems:
        raise Refused(problems[0], fix=NextStep("list all problems", "audit verify"))
    project.store.blobs.exists(TRUST_KEY)  # raises where a bucket cannot be used
    return _check(
        "store", f"the database opens and the audit log verifies; objects are in {project.store.blobs.where('')}"
    )


def _champions(directory: Path) -> Check:
    from tunesmith.services.rollouts import refused_champions

    project = Project.load(directory)
    refused = refused_champions(project.store) if project.store.is_made else []
    if refused:
        warnings = "; ".join(str(champion.warning) for champion in refused)
        raise Refused(warnings, fix=NextStep("list the rollouts", "rollout status"))
    return _check("champions", "all may serve")
