"""A training on several ranks (FSDP2 over gloo) beside the same training in one process, on tiny random models."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.hf_models import write_hf_model
from tests.process_group import run_ranks
from tests.said import Said
from tests.tiny import row
from tests.training.test_resume import written
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.factory import load_sharded
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.protocol import Generation
from tunesmith.engines.ranks import Ranks, connected_ranks, held
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.rendering import Rendered
from tunesmith.models.weight_files import ADAPTER_FILE, MODEL_FILE
from tunesmith.records.training import ValidationScore
from tunesmith.training.batches.batch_plan import lay_out_steps, step_labels, step_tokens
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.launchers import begin, end, take_part
from tunesmith.training.scoring import AnswerScore, Score
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingResult, TrainingSpec
from tunesmith.training.train import run_training

# Answers of very different lengths, so that the ranks of a step have different numbers of labels.
ROWS = [TrainingRow(f"r{n}", row(f"turn on light {n}", f'{{"n":{n}{",also:kitchen" * (n % 3)}}}')) for n in range(14)]
SETTINGS: dict[str, Any] = {
    "rank": 1, "batch": 4, "epochs": 2, "tokens": 96, "learning_rate": 0.01, "checkpoint_seconds": 1e-9,
    "validations": 2, "warmup": 0.2, "weight_decay": 0.01, "rehearse": 0.3,
}  # fmt: skip


def make(folder: Path, rows: int = 14, **changes: Any) -> TrainingSpec:
    if not (folder / "model").exists():
        write_hf_model(folder / "model", "phi3")
    stated = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
    return written(folder, TrainSettings.model_validate(stated), ROWS[:rows], validation=ROWS[:5])


def alone(spec: TrainingSpec, progress: Progress = SILENT) -> TrainingResult:
    return run_training(spec, progress, model=LoadedHFModel(spec.base))


def adapter(result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder / ADAPTER_FILE)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _request(number: int) -> Generation:
    """One that ends earlier or later than others."""
    return Generation((Message(role="user", content=f"turn on light {number}"),), max_tokens=2 + 3 * (number % 4))


def work(rank: int, size: int, spec: str, kill_at: int | None = None, score: bool = False, copies: int = 1) -> None:
    """What a rank does: rank 0 as the command line does, the others led by it."""
    ranks = connected_ranks(copies)
    if kill_at is not None and rank == size - 1:
        _kill_after(kill_at)
    if rank:
        _checking(ranks)
        take_part(ranks)
        return
    made = TrainingSpec.model_validate_json(spec)
    model = load_sharded(made.base, ranks)

    def mean(trained: TrainableModel | None, rows: int) -> Score:
        asked = [_request(n) for n in range(rows)]
        given = model.answer_together(asked, trained)
        if trained is not None:  # the untrained base is asked to time its answers
            with (made.work / "answers.jsonl").open("a") as stream:
                stream.write(json.dumps([answer.text for answer in given]) + "\n")
        return Score(len(set(given)) / rows, 0.1)

    scored = AnswerScore("exact_match", 5, mean) if score else None
    begin(ranks, made, scored)
    result = run_training(made, SILENT, model=model, score=scored, ranks=ranks)
    write_atomic(made.work / "result.json", result.model_dump_json().encode())
    end(ranks)


def _kill_after(step: int) -> None:
    """End this rank as a machine that loses its power does, in the middle of a step."""
    losses, calls = HFTrainable._label_losses, iter(range(10**9))  # of steps and validations

    def killing(self: HFTrainable, *given: Any, **named: Any) -> torch.Tensor:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(self, *given, **named)

    HFTrainable._label_losses = killing  # type: ignore[method-assign]


def _checking(ranks: Ranks) -> None:
    """Check at each checkpoint that this rank holds its rows only, of the adapter and the moments, and that it reads no
    clock."""
    save, clock = Checkpoints.save, Ranks.clock
    Ranks.clock = lambda self, own: clock(self, lambda: 1 / 0)  # type: ignore[method-assign]

    def checked(self: Checkpoints, step: int, tensors: dict[str, torch.Tensor], state: Any) -> None:
        for name, tensor in tensors.items():
            parts = ranks.size // ranks.copies
            chunk = -(-tensor.shape[0] // parts)
            rows = max(0, min(chunk, tensor.shape[0] - ranks.rank % parts * chunk))
            assert held(tensor).shape == (rows, *tensor.shape[1:]), name
        save(self, step, tensors, state)

    Checkpoints.save = checked  # type: ignore[method-assign,assignment]


def together(spec: TrainingSpec, size: int, *given: Any) -> TrainingResult:
    codes = run_ranks(work, size, spec.work / "meeting", spec.model_dump_json(), *given)
    assert codes == [0] * size
    return TrainingResult.model_validate_json((spec.work / "result.json").read_bytes())


@pytest.mark.slow
def test_full_training_learns_what_one_process_learns(tmp_path: Path) -> None:
    changes = {"method": "full", "rank": None, "layers": 1, "recompute": True, "epochs": 1}
    one, several = alone(make(tmp_path / "one", **changes)), together(make(tmp_path / "several", **changes), 2)
    assert losses(one) == pytest.approx(losses(several), abs=1e-5)
    assert {path.name for path in one.folder.iterdir()} == {path.name for path in several.folder.iterdir()}
    assert furthest(*(load_file(result.folder / MODEL_FILE) for result in (one, several))) < 1e-5
    sizes = [path.stat().st_size for path in (tmp_path / "several" / "work" / "step-00000005").glob("tensors*")]
    assert (len(sizes), max(sizes) < 0.6 * sum(sizes)) == (2, True), "neither rank wrote what the other holds"


def losses(result: TrainingResult) -> list[float]:
    return [each.loss for each in (*result.body.curve, *result.body.validation)]


@pytest.mark.slow
def test_killed_it_resumes_on_as_many_ranks_and_on_others(tmp_path: Path) -> None:
    """Every rank's part of the adapter, of the optimiser's state and of the best weights comes back: on two ranks, on
    four with two copies of the model, and in one process."""
    killed = make(tmp_path / "killed")
    assert -signal.SIGKILL in run_ranks(work, 2, tmp_path / "meeting", killed.model_dump_json(), 11)
    (newest,) = sorted(killed.work.glob("step-*"))[-1:]
    assert 0 < int(newest.name.removeprefix("step-")) < 10
    one, undisturbed = alone(make(tmp_path / "one")), together(make(tmp_path / "undisturbed"), 2)
    for size, copies in ((2, 1), (4, 2), (1, 1)):
        shutil.copytree(tmp_path / "killed", tmp_path / str(size))
        spec = make(tmp_path / str(size))
        resumed = alone(spec) if size == 1 else together(spec, size, None, False, copies)
        assert furthest(adapter(one), adapter(resumed)) < 1e-5
        assert losses(one) == pytest.approx(losses(resumed), abs=1e-5)
        assert one.body.rehearsed == resumed.body.rehearsed > 0
        assert any("2 ranks trained until step" in notice for notice in resumed.body.notices) == (size != 2)
        if size == 2:
            assert digest_file(resumed.folder / ADAPTER_FILE) == digest_file(undisturbed.folder / ADAPTER_FILE)
        if size == 4:
            assert (resumed.body.environment.ranks, resumed.body.environment.copies) == (4, 2)
            assert any("then 4 ranks with 2 copies" in notice for notice in resumed.body.notices)
    part, said = killed.work / newest.name / "tensors-1.safetensors", Said()
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert losses(alone(killed, said)) == pytest.approx(losses(one), abs=1e-5)
    assert any(f"{newest.name} is damaged; resuming from the one before it" in line for line in said.lines)


@pytest.mark.slow
def test_all_ranks_answer_and_rank_0_decides(tmp_path: Path) -> None:
    """Within a budget and with scores of generated answers: the answers are those of the adapter in one process, the
    score decides, and no clock but rank 0's is read."""
    spec = make(tmp_path, rows=4, budget="10m", validations=3)
    decisions = together(spec, 2, None, True).body.decisions
    assert decisions is not None
    assert [each.reason for each in decisions.decays] == ["all epochs are done"]
    assert decisions.scored_rows == 0  # fewer than 30 rows, which the budget refuses to score
    scored = together(make(tmp_path / "scored", epochs=1), 3, None, True)
    assert scored.body.score == ValidationScore(metric="exact_match", rows=5)
    assert all(0.0 < (each.score or 0.0) <= 1.0 for each in scored.body.validation)
    engine = LoadedHFModel(spec.base).engine()
    engine.load_adapter("trained", scored.folder)
    expected = [answer.text for answer in engine.generate([_request(n) for n in range(5)], "trained")]
    answers = [json.loads(line) for line in (tmp_path / "scored" / "work" / "answers.jsonl").read_text().splitlines()]
    assert answers[[each.step for each in scored.body.validation].index(scored.body.kept)] == expected
    assert len({tuple(each) for each in answers}) > 1 or len(answers) == 1


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_ranks_of_a_step_compute_its_rows_once(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    for number in range(20):
        count = int(torch.randint(1, 9, (1,), generator=draw))
        lengths = torch.randint(3, 40, (count,), generator=draw).tolist()
        rows = [Rendered(tuple(range(n)), tuple(place > n // 2 for place in range(n))) for n in lengths]
        parts = [lay_out_steps([rows], 64, Ranks(rank, size), share=False) for rank in range(size)]
        assert len({len(part) for part in parts}) == 1, number
        assert len({(step_tokens(part), step_labels(part)) for part in parts}) == 1
        assert step_labels(parts[0]) == step_labels(lay_out_steps([rows], 64, share=False))
        labels = [label for part in parts for batch in part for label in batch.labels.tolist()]
        assert sorted(labels) == sorted(token for one in rows for token in one.ids[len(one.ids) // 2 + 1 :])


def _agree(rank: int, size: int, folder: Path) -> None:
    ranks = connected_ranks()
    assert ranks.gather({"rank": rank, "long": "x" * 10**rank}) == [
        {"rank": n, "long": "x" * 10**n} for n in range(size)
    ]
    assert ranks.total(0.1 * (rank + 1)) == 0.1 + 0.2 + 0.3 * 1.0000000000000002
    assert ranks.most(-rank) == 0
    assert ranks.agree(lambda: rank) == 0
    assert ranks.clock(lambda: 1 / (1 - rank))() == 1.0  # rank 1's would raise
    try:
        ranks.agree(lambda: 1 / 0)
    except (ZeroDivisionError, TunesmithError) as error:
        (folder / f"{rank}").write_text(f"{type(error).__name__}: {error}")


def test_ranks_agree_on_what_rank_0_says(tmp_path: Path) -> None:
    assert run_ranks(_agree, 3, tmp_path / "meeting", tmp_path) == [0, 0, 0]
    stopped = "TunesmithError: rank 0 stopped: division by zero"
    said = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert said == ["ZeroDivisionError: division by zero", *[stopped] * 2]
