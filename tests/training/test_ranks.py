"""A training on several ranks (FSDP2 over gloo) beside the same training in one process, on tiny random models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.hf_models import write_hf_model
from tests.process_group import run_ranks
from tests.tiny import row
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Silent
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.factory import load_sharded
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.protocol import Generation
from tunesmith.engines.ranks import ALONE, Ranks, connected_ranks, first_row, held, whole
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import resolve_base
from tunesmith.models.rendering import Rendered
from tunesmith.models.weight_files import ADAPTER_FILE, MODEL_FILE
from tunesmith.store.store import Store
from tunesmith.training.batches.batch_plan import lay_out_rank, lay_out_step, step_labels, step_tokens
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.launchers.together import begin, end, take_part
from tunesmith.training.scoring import AnswerScore, Score
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingResult, TrainingSpec
from tunesmith.training.train import make_spec, run_training

# Answers of very different lengths, so that the ranks of a step have different numbers of labels.
ROWS = [TrainingRow(f"r{n}", row(f"turn on light {n}", f'{{"n":{n}{",also:kitchen" * (n % 3)}}}')) for n in range(14)]
SETTINGS: dict[str, Any] = {
    "rank": 3, "batch": 4, "epochs": 2, "tokens": 96, "learning_rate": 0.01, "checkpoint_seconds": 1e-9,
    "validations": 2, "warmup": 0.2, "weight_decay": 0.01,
}  # fmt: skip


def make(folder: Path, family: str = "phi3", rows: int = 14, **changes: Any) -> TrainingSpec:
    if not (folder / "model").exists():
        write_hf_model(folder / "model", family)
    base = resolve_base(Store(folder / "store"), str(folder / "model"), folder)
    settings = TrainSettings.model_validate(
        {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
    )
    return make_spec(
        base=base, dataset="", rows=ROWS[:rows], validation=ROWS[:5], settings=settings, work=folder / "work"
    )


def alone(spec: TrainingSpec) -> TrainingResult:
    return run_training(spec, model=LoadedHFModel(spec.base))


def adapter(result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder / ADAPTER_FILE)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class _Heard(Silent):
    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, text: str) -> None:
        with self._path.open("a") as stream:
            stream.write(f"{text}\n")


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
    result = run_training(made, _Heard(made.work / "said"), model=model, score=scored, ranks=ranks)
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
@pytest.mark.parametrize(
    ("size", "family", "changes"),
    [
        (3, "phi3", {"rank": 1, "dora": True, "scaling": "root", "rehearse": 0.3}),  # of A, two ranks hold nothing
        (2, "phi3", {"method": "full", "rank": None, "rehearse": 0.3, "layers": 1, "recompute": True}),
    ],
)
def test_it_learns_what_one_process_learns(tmp_path: Path, size: int, family: str, changes: dict[str, Any]) -> None:
    one = alone(make(tmp_path / "one", family, epochs=1, **changes))
    several = together(make(tmp_path / "several", family, epochs=1, **changes), size)
    assert losses(one) == pytest.approx(losses(several), abs=1e-5)
    assert several.state.step == one.state.step == 5
    assert (several.environment["ranks"], "ranks" in one.environment) == (size, False)
    assert {path.name for path in one.folder.iterdir()} == {path.name for path in several.folder.iterdir()}
    assert one.rehearsed == several.rehearsed == 4
    kept = [(tmp_path / name / "work" / "rehearsal.jsonl").read_bytes() for name in ("one", "several")]
    assert kept[0] == kept[1]
    file = MODEL_FILE if "method" in changes else ADAPTER_FILE
    weights = [load_file(result.folder / file) for result in (one, several)]
    assert furthest(*weights) < 1e-5
    headers = 8000 * (size - 1)  # of the other ranks' files; a rank's part of the base is 49,000 bytes or more
    assert several.checkpoint_bytes == pytest.approx(one.checkpoint_bytes, rel=0.1, abs=headers)
    if "method" in changes:  # neither rank wrote what the other holds
        sizes = [path.stat().st_size for path in (tmp_path / "several" / "work" / "step-00000005").glob("tensors*")]
        assert (len(sizes), max(sizes) < 0.6 * sum(sizes)) == (2, True)


def losses(result: TrainingResult) -> list[float]:
    return [each["loss"] for each in [*result.state.curve, *result.state.validation]]


@pytest.mark.slow
def test_killed_it_resumes_on_as_many_ranks_and_on_others(tmp_path: Path) -> None:
    """Every rank's part of the adapter, of the optimiser's state and of the best weights comes back: on two ranks, on
    four with two copies of the model, and in one process."""
    killed = make(tmp_path / "killed")
    assert -signal.SIGKILL in run_ranks(work, 2, tmp_path / "meeting", killed.model_dump_json(), 11)
    (newest,) = sorted(killed.work.glob("step-*"))[-1:]
    assert 0 < int(newest.name.removeprefix("step-")) < 8
    one, undisturbed = alone(make(tmp_path / "one")), together(make(tmp_path / "undisturbed"), 2)
    for size, copies in ((2, 1), (4, 2), (1, 1)):
        shutil.copytree(tmp_path / "killed", tmp_path / str(size))
        spec = make(tmp_path / str(size))
        resumed = alone(spec) if size == 1 else together(spec, size, None, False, copies)
        assert furthest(adapter(one), adapter(resumed)) < 1e-5
        assert losses(one) == pytest.approx(losses(resumed), abs=1e-5)
        assert any("2 ranks trained until step" in notice for notice in resumed.notices) == (size != 2)
        if size == 2:
            assert digest_file(resumed.folder / ADAPTER_FILE) == digest_file(undisturbed.folder / ADAPTER_FILE)
        if size == 4:
            assert (resumed.environment["ranks"], resumed.environment["copies"]) == (4, 2)
            assert any("then 4 ranks with 2 copies" in notice for notice in resumed.notices)


STATE = {f"{name}.{part}": shape for part in ("parameter", "exp_avg", "exp_avg_sq")
         for name, shape in (("odd", (7, 3)), ("one", (1, 4)), ("vector", (5,)))}  # fmt: skip


def _state(size: int) -> dict[str, torch.Tensor]:
    """Numbers of whole tensors, the same in every process; sharded where there are several."""
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=draw) for name, shape in STATE.items()}
    if size == 1:
        return made
    mesh = init_device_mesh("cpu", (size,))
    return {name: distribute_tensor(each, mesh, [Shard(0)]) for name, each in made.items()}


def _save_part(rank: int, size: int, folder: Path) -> None:
    Checkpoints(folder, {}, connected_ranks()).save(3, _state(size), {"own": 1})


def _load_part(_rank: int, size: int, folder: Path, ranks: Ranks | None = None) -> None:
    found, damaged = Checkpoints(folder, {}, ranks or connected_ranks()).load()
    assert found is not None
    assert not damaged
    tensors, state = found
    assert (state["step"], state["own"]) == (3, 1)
    for name, expected in _state(size).items():
        read = tensors.like(name, torch.zeros_like(expected))
        assert torch.equal(held(read), held(expected)), name
        assert torch.equal(whole(read), whole(expected)), name


def test_each_rank_writes_its_rows_and_any_number_reads_them(tmp_path: Path) -> None:
    """Parameters and both moments come back bit for bit, on as many ranks, on more, and in one process."""
    folder = tmp_path / "work"
    assert run_ranks(_save_part, 2, tmp_path / "meeting", folder) == [0, 0]
    rows = {path.name: len(load_file(path)["odd.parameter"]) for path in folder.glob("step-00000003/tensors*")}
    assert rows == {"tensors.safetensors": 4, "tensors-1.safetensors": 3}
    for size in (2, 3):
        assert run_ranks(_load_part, size, tmp_path / "meeting", folder) == [0] * size
    _load_part(0, 1, folder, ALONE)
    part = folder / "step-00000003" / "tensors-1.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert Checkpoints(folder, {}).load() == (None, ["step-00000003"])


@pytest.mark.slow
def test_all_ranks_answer_and_rank_0_decides(tmp_path: Path) -> None:
    """Within a budget and with scores of generated answers: the answers are those of the adapter in one process, the
    score decides, and no clock but rank 0's is read."""
    spec = make(tmp_path, rows=4, epochs=None, budget="10m", validations=3)
    result = together(spec, 2, None, True)
    assert result.decisions is not None
    assert [each.reason for each in result.decisions.decays] == ["all epochs are done"]
    assert result.decisions.scored_rows == 0  # fewer than 30 rows, which the budget refuses to score
    scored = together(make(tmp_path / "scored", epochs=1), 3, None, True)
    assert scored.score == {"metric": "exact_match", "rows": 5}
    assert all(0.0 < each["score"] <= 1.0 for each in scored.state.validation)
    engine = LoadedHFModel(spec.base).engine()
    engine.load_adapter("trained", scored.folder)
    expected = [answer.text for answer in engine.generate([_request(n) for n in range(5)], "trained")]
    answers = [json.loads(line) for line in (tmp_path / "scored" / "work" / "answers.jsonl").read_text().splitlines()]
    assert answers[scored.state.best or 0] == expected
    assert len({tuple(each) for each in answers}) > 1 or len(answers) == 1


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_ranks_of_a_step_compute_its_rows_once(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    for number in range(20):
        count = int(torch.randint(1, 9, (1,), generator=draw))
        lengths = torch.randint(3, 40, (count,), generator=draw).tolist()
        rows = [Rendered(tuple(range(n)), tuple(place > n // 2 for place in range(n))) for n in lengths]
        parts = [lay_out_rank([rows], 64, Ranks(rank, size), share=False) for rank in range(size)]
        assert len({len(part) for part in parts}) == 1, number
        assert len({(step_tokens(part), step_labels(part)) for part in parts}) == 1
        assert step_labels(parts[0]) == step_labels(lay_out_step(rows, 64, share=False))
        labels = [label for part in parts for batch in part for label in batch.labels.tolist()]
        assert sorted(labels) == sorted(token for one in rows for token in one.ids[len(one.ids) // 2 + 1 :])


def test_one_process_exchanges_nothing() -> None:
    assert ALONE.agree(lambda: "own") == "own"
    assert (ALONE.gather(1), ALONE.total(1.5), ALONE.most(3)) == ([1], 1.5, 3)
    tensor = torch.ones(2)
    assert held(tensor) is whole(tensor) is tensor
    assert first_row(tensor) == 0


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
