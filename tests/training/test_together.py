"""Several adapters trained at once: each ends in the bytes of a training alone, with whomever it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import row, write_model
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT
from tunesmith.models.batch import Batch, lay_out
from tunesmith.models.network import Network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weights import load_network
from tunesmith.training import together
from tunesmith.training.batches import lay_out_step, plan
from tunesmith.training.loop import Course, Run, fit
from tunesmith.training.lora import Lora
from tunesmith.training.settings import TrainSettings
from tunesmith.training.together import fit_together

# Ranks, targets, seeds, rates, rows, epochs and ends of all kinds; one stops early, one has parts.
KINDS: list[dict] = [
    {"rank": 4},
    {"rank": 9, "seed": 3, "learning_rate": 0.03},
    {"targets": ("q_proj", "down_proj"), "epochs": 2, "batch": 3},
    {"layers": 1, "b_rate": 4.0, "rows": 5, "weight_decay": 0.1, "scaling": "root"},
    {"learning_rate": 0.2, "patience": 1, "validations": 10, "epochs": 6, "schedule": "constant", "rows": 7},
    {"tokens": 64, "batch": 5, "keep": "last"},
    {"start": "pissa"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    texts = [(f"turn on light {n}", f'{{"intent":"on","light":{n}}}' + " and so on" * (n % 4)) for n in range(12)]
    return [renderer.conversation(row(*each)) for each in texts]


def _planned(rows: list[Rendered], kind: dict) -> tuple[TrainSettings, list, list[Batch]]:
    settings = TrainSettings(**{"batch": 2, "learning_rate": 0.01, "validations": 2, **kind})
    chosen = rows[: settings.rows or 10]
    steps = [
        lay_out_step([chosen[place] for place in batch], settings.tokens)
        for epoch in range(settings.epochs)
        for batch in plan(chosen, settings.batch, settings.seed, epoch)
    ]
    return settings, steps, [lay_out(rows[10:])]


def _alone(network: Network, rows: list[Rendered], kind: dict, folder: Path) -> tuple[Course, list[Tensor]]:
    settings, steps, validation = _planned(rows, kind)
    lora = Lora(network, settings)
    return fit(network, lora, steps, validation, settings, folder, {}, SILENT), lora.masters


def _run(network: Network, rows: list[Rendered], kind: dict, folder: Path) -> Run:
    settings, steps, validation = _planned(rows, kind)
    return Run(network, Lora(network, settings), steps, validation, settings, folder, {}, SILENT)


def _story(course: Course) -> tuple:
    curve = [{key: value for key, value in each.items() if key != "seconds"} for each in course.curve]
    return course.step, course.ended, curve, course.validation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_ends_in_the_bytes_of_a_training_alone(
    tmp_path: Path, folder: Path, rows: list[Rendered], dtype: torch.dtype
) -> None:
    network = load_network(folder, dtype)
    alone = [_alone(network, rows, kind, tmp_path / f"alone{n}") for n, kind in enumerate(KINDS)]
    runs = [_run(network, rows, kind, tmp_path / f"joint{n}") for n, kind in enumerate(KINDS)]
    order: list[int] = []
    assert not fit_together(network, runs, SILENT, order.append)
    for run, (course, masters) in zip(runs, alone, strict=True):
        assert _story(run.course) == _story(course)
        for joint, single in zip(run.trained.masters, masters, strict=True):
            assert torch.equal(joint, single)
    assert runs[4].course.ended, "one run stops early"
    assert runs[4].course.step < len(runs[4].plan)
    assert any(len(step) > 1 for step in runs[5].plan), "one computes its steps in parts"
    assert sorted(order) == list(range(len(KINDS)))
    assert order != sorted(order), "runs of unequal length leave when they end"


def test_stopped_and_carried_on_it_ends_in_the_same_bytes(
    tmp_path: Path, folder: Path, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(folder, torch.bfloat16)
    kinds = [{**kind, "checkpoint_seconds": 1e-9} for kind in KINDS[:3]]
    alone = [_alone(network, rows, kind, tmp_path / f"alone{n}")[1] for n, kind in enumerate(kinds)]
    save, left = Run.save, 8

    def failing(run: Run) -> None:
        nonlocal left
        left -= 1
        if left == 0:  # in the middle of a joint step: the first run is a step ahead of the others
            raise KeyboardInterrupt
        save(run)

    monkeypatch.setattr(Run, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        fit_together(network, [_run(network, rows, kind, tmp_path / f"j{n}") for n, kind in enumerate(kinds)], SILENT)
    monkeypatch.setattr(Run, "save", save)
    again = [_run(network, rows, kind, tmp_path / f"j{n}") for n, kind in enumerate(kinds)]
    assert len({run.course.step for run in again}) > 1
    assert all(run.course.step for run in again)
    fit_together(network, again, SILENT)
    for run, masters in zip(again, alone, strict=True):
        assert all(torch.equal(*each) for each in zip(run.trained.masters, masters, strict=True))


def test_one_that_fails_leaves_and_the_others_go_on(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    network = load_network(folder, torch.float32)
    alone = _alone(network, rows, KINDS[0], tmp_path / "alone")[1]
    runs = [_run(network, rows, KINDS[n], tmp_path / f"j{n}") for n in (1, 0)]
    with torch.no_grad():
        runs[0].trained.masters[0].fill_(float("nan"))
    runs[0].trained.refresh_copies()
    failed = fit_together(network, runs, SILENT)
    assert list(failed) == [0]
    assert isinstance(failed[0], TunesmithError)
    assert "the loss became nan at step 1" in failed[0].what
    assert all(torch.equal(*each) for each in zip(runs[1].trained.masters, alone, strict=True))


def test_a_pass_holds_no_more_tokens_than_one_run_may(
    tmp_path: Path, folder: Path, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(folder, torch.float32)
    kinds = [{"tokens": 250, "seed": seed} for seed in range(4)]
    alone = [_alone(network, rows, kind, tmp_path / f"alone{n}")[1] for n, kind in enumerate(kinds)]
    seen: list[int] = []
    losses = together.joint_losses

    def counting(network: Network, parts: list[together.Part]) -> list[Tensor]:
        seen.append(sum(part.batch.tokens for part in parts) if len(parts) > 1 else 0)
        return losses(network, parts)

    monkeypatch.setattr(together, "joint_losses", counting)
    runs = [_run(network, rows, kind, tmp_path / f"j{n}") for n, kind in enumerate(kinds)]
    fit_together(network, runs, SILENT)
    assert 0 < max(seen) <= 250
    for run, masters in zip(runs, alone, strict=True):
        assert all(torch.equal(*each) for each in zip(run.trained.masters, masters, strict=True))


def test_between_passes_a_run_holds_masters_and_moments_alone(
    tmp_path: Path, folder: Path, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are there during a run's pass, gradients of masters during its update."""
    network = load_network(folder, torch.bfloat16)
    monkeypatch.setattr(together, "TOKENS", 250)
    runs = [_run(network, rows, {"seed": seed}, tmp_path / f"j{seed}") for seed in range(4)]
    update, losses = Run.advance, together.joint_losses
    moved: list[int] = []
    computed: list[int] = []

    def advancing(run: Run, *given: object) -> None:
        moved.append(sum(each.trained.masters[0].grad is not None for each in runs))
        update(run, *given)  # type: ignore[arg-type]

    def computing(network: Network, parts: list[together.Part]) -> list[Tensor]:
        found = losses(network, parts)
        computed.append(sum(bool(run.trained._pairs) for run in runs) - len(parts))
        return found

    monkeypatch.setattr(Run, "advance", advancing)
    monkeypatch.setattr(together, "joint_losses", computing)
    fit_together(network, runs, SILENT)
    assert set(moved) == {1}
    assert set(computed) == {0}
    assert not any(run.trained._pairs for run in runs)
    assert all(sum(map(len, run.trained.masters)) == run.trained.parameters for run in runs)
