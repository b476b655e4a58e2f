"""docs/reference/training-support.md, cell by cell."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.hf_models import FAMILIES as HF_FAMILIES
from tests.hf_models import write_hf_model
from tests.made_once import MadeOnce
from tests.process_group import run_ranks
from tests.tiny import SIZES, WIDE, row, write_model
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.engines import weights
from tunesmith.engines.factory import check_weight_settings
from tunesmith.engines.hf.engine import HFEngine, LoadedHFModel, ShardedHFModel, build_trainable
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.native.engine import NativeModel
from tunesmith.engines.protocol import Generation
from tunesmith.engines.ranks import ALONE, Ranks, connected_ranks, held, whole
from tunesmith.engines.settings import EngineSettings, WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store
from tunesmith.training.batches.batch_plan import lay_out_steps
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, parameters, update

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "training-support.md"
ROWS = [row(f"turn on light {n}", '{"on":true' + ',"room":"hall"' * n + "}") for n in range(5)]
REQUESTS = [Generation((Message(role="user", content=f"light {n}"),), max_tokens=2 + 2 * n) for n in range(3)]


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    below = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


WHERE = ("native", "hf", "ranks")
METHODS = {cells[0]: dict(zip(WHERE, cells[1:], strict=True)) for cells in table("Settings of `train`")}
FAMILIES = {cells[0]: cells[2] for cells in table("Kinds of families on several ranks")}
SEVERAL = [
    *[("phi3", setting) for setting, cells in METHODS.items() if cells["ranks"] == "yes"],
    *[(family, "method: lora") for family, cell in FAMILIES.items() if cell == "yes"],
    *[(family, "targets: [q_proj, k_proj, v_proj, o_proj]") for family in ("mixtral", "qwen3_moe")],
]


def _base(folder: Path, family: str, sizes: dict[str, Any] = SIZES) -> Base:
    if not (folder / family).exists():
        write_hf_model(folder / family, family) if family in HF_FAMILIES else write_model(
            folder / family, family, sizes=sizes
        )
    return resolve_base(Store(folder / "store"), str(folder / family), folder)


def _settings(setting: str) -> TrainSettings:
    return TrainSettings.model_validate({"learning_rate": 0.01, **yaml.safe_load(setting)})


def _two_steps(model: TrainableModel, base: Base, settings: TrainSettings, ranks: Ranks = ALONE) -> list[float]:
    rows = [Renderer(base.folder).conversation(messages) for messages in ROWS]
    alone, optimizer = ranks.size == 1, make_optimizer(model, settings)
    step = lay_out_steps([rows], 96, share=False) if alone else lay_out_steps([rows], 96, ranks, share=False)
    losses = []
    for _ in range(2):
        losses.append(gradients(model, CrossEntropy(), step, ranks))
        update(model, optimizer, settings.learning_rate, 1.0)
    return losses


def _tensors(model: TrainableModel) -> dict[str, torch.Tensor]:
    return {str(number): whole(each.detach()).contiguous() for number, each in enumerate(parameters(model))}


def _rank(rank: int, _size: int, folder: Path, cases: list[tuple[int, str, str]]) -> None:
    ranks = connected_ranks()
    for number, family, setting in cases:
        base, settings = _base(folder, family), _settings(setting)
        model = ShardedHFModel(base, ranks)
        trained = model.trainable(settings, seed=1, state_bytes=16)
        numbers = [(held(each).numel(), each.numel()) for each in trained._model.module.parameters()]
        assert sum(mine for mine, _ in numbers) < 0.6 * sum(every for _, every in numbers)
        stored = load_file(base.folder / "model.safetensors")
        for name, each in trained._model.module.named_parameters():
            own = stored.get(name.replace(".base_layer", ""))
            if own is not None and not each.requires_grad and setting != "start: pissa":
                assert torch.equal(whole(each.detach()), own.to(each.dtype)), name
        losses = _two_steps(trained, base, settings, ranks)
        found, answers = _tensors(trained), model.answer_together(REQUESTS if rank == 0 else [], trained)
        if rank == 0:
            save_file(found, folder / f"{number}.safetensors")
            texts = [answer.text for answer in answers]
            (folder / f"{number}.json").write_text(json.dumps({"losses": losses, "answers": texts}))


@pytest.fixture(scope="module")
def trained_together(made_once: MadeOnce) -> Path:
    """The results of all cells that two ranks train."""

    def train(folder: Path) -> None:
        for family in {family for family, _ in SEVERAL}:
            _base(folder, family)
        numbered = [(number, *case) for number, case in enumerate(SEVERAL)]
        assert run_ranks(_rank, 2, folder / "meeting", folder, numbered) == [0, 0]

    return made_once("trained-together", train)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SEVERAL)), ids=[" ".join(case) for case in SEVERAL])
def test_several_ranks_train_it(trained_together: Path, number: int) -> None:
    base, settings = _base(trained_together, SEVERAL[number][0]), _settings(SEVERAL[number][1])
    alone = LoadedHFModel(base).trainable(settings, seed=1, state_bytes=16)
    started = {name: each.clone() for name, each in _tensors(alone).items()}
    losses, expected = _two_steps(alone, base, settings), _tensors(alone)
    found = load_file(trained_together / f"{number}.safetensors")
    stated = json.loads((trained_together / f"{number}.json").read_bytes())
    exact = settings.precision != "bf16"  # in which ranks and one process round differently
    assert losses == pytest.approx(stated["losses"], abs=1e-5 if exact else 0.02)
    apart = torch.cat([(expected[name] - found[name]).abs().flatten() for name in expected])
    assert apart.max() < 1e-5 if exact else apart.mean() < 2e-3
    assert all(not torch.equal(expected[name], started[name]) for name in expected)
    given = HFEngine(base, lambda: alone._model).generate_together(REQUESTS, alone.adapter)
    assert not exact or [answer.text for answer in given] == stated["answers"]


@pytest.mark.parametrize("setting", METHODS)
@pytest.mark.parametrize("where", WHERE)
def test_it_is_refused_by_name_or_accepted(setting: str, where: str) -> None:
    settings, ranks = _settings(setting), 2 if where == "ranks" else 1
    engine = EngineSettings(train="native" if where == "native" else "hf")
    if METHODS[setting][where] != "refused":
        check_weight_settings("llama", settings, "train", engine, ranks=ranks)
        return
    with pytest.raises(Refused) as refused:
        check_weight_settings("llama", settings, "train", engine, ranks=ranks)
    assert refused.value.where == ("engine.train" if where == "native" else f"train.{setting.split(':')[0]}")
    assert setting.split(":")[0] in str(refused.value) or "4 bits" in str(refused.value)


@pytest.mark.parametrize("family", [family for family, cell in FAMILIES.items() if cell == "refused"])
def test_a_family_is_refused_before_it_is_sharded(tmp_path: Path, family: str) -> None:
    with pytest.raises(Refused, match=r"would have no effect|experts whose weights are fused"):
        ShardedHFModel(_base(tmp_path, family), Ranks(0, 2)).trainable(WeightSettings(), seed=1, state_bytes=16)


@pytest.mark.parametrize(
    ("setting", "where"),
    [(setting, where) for setting, cells in METHODS.items() for where in WHERE[:2] if cells[where] == "yes"],
)
def test_one_process_trains_it(tmp_path: Path, setting: str, where: str) -> None:
    base, settings = _base(tmp_path, "llama", WIDE), WeightSettings.model_validate(yaml.safe_load(setting))
    loaded = NativeModel(base) if where == "native" else LoadedHFModel(base)
    trained = loaded.trainable(settings, seed=1, state_bytes=16)
    assert isinstance(trained, HFTrainable) == (where == "hf")
    losses = _two_steps(trained, base, _settings(setting))
    assert losses[1] < losses[0]
    assert math.isfinite(losses[1])


# Ranks that read only their rows of the weights, and ranks that read all of them first


STARTS = {cells[0]: cells[1] for cells in table("How several ranks start")}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {}), ("opt", {}), ("phi3", {"precision": "bf16"}), ("llama", {"method": "full", "precision": "bf16"}),
]  # fmt: skip


def _late_rank(_rank: int, _size: int, folder: Path) -> None:
    for family, changes in CASES:
        _compare(connected_ranks(), folder, family, changes)


def _compare(ranks: Ranks, folder: Path, family: str, changes: dict[str, Any]) -> None:
    base, settings = _base(folder, family), TrainSettings.model_validate({"learning_rate": 0.01, **changes})
    found, losses = [], []
    for late in (True, False):
        model = HFModel(base, model_settings(settings), late=late)
        assert (model.late is not None) == late
        if late:
            sizes = [each.untyped_storage().nbytes() for each in model.module.parameters()]
            assert max(sizes) <= 4, "the weights take no memory before they are sharded"
        trained = build_trainable(model, settings, 1, ranks)
        assert all(0 < held(each).numel() < each.numel() for each in model.module.parameters())
        assert model.pads
        losses.append(_two_steps(trained, base, settings, ranks))
        parameters = dict(model.module.named_parameters())
        assert all(0 < held(each).numel() < each.numel() for each in parameters.values())
        found.append({name.replace(f".{trained.adapter}", ""): each for name, each in parameters.items()})
        found[-1] |= {f"buffer {name}": each for name, each in model.module.named_buffers()}
    one, two = found
    assert losses[0] == losses[1]
    assert one.keys() == two.keys()
    for name, each in one.items():
        assert each.dtype == two[name].dtype, name
        assert torch.equal(held(each), held(two[name])), name
    stored = load_file(base.folder / "model.safetensors")
    frozen = [name for name, each in one.items() if not (each.requires_grad or name.startswith("buffer "))]
    for name in frozen:
        assert torch.equal(whole(one[name].detach()).float(), stored[name.replace(".base_layer.", ".")].to(
            one[name].dtype).float())  # fmt: skip


@pytest.mark.slow
def test_rows_that_are_read_late_are_those_of_the_whole_weights(tmp_path: Path) -> None:
    """Weights, buffers, losses and adapters are equal, bit by bit."""
    for family, _ in CASES:
        _base(tmp_path, family)
    assert run_ranks(_late_rank, 2, tmp_path / "meeting", tmp_path) == [0, 0]


def test_files_that_do_not_hold_the_modules_tensors_are_read_whole(tmp_path: Path) -> None:
    """A tensor too many: the usual way says what is wrong."""
    base = _base(tmp_path, "llama")
    assert HFModel(base, late=True).late is not None
    path = base.folder / "model.safetensors"
    save_file({**load_file(path), "more.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"unexpected keys such as more\.weight"):
        HFModel(base, late=True)


@pytest.mark.parametrize("changes", [{"start": "pissa"}, {"dora": True}], ids=str)
def test_what_needs_whole_weights_is_refused_where_they_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = WeightSettings.model_validate({"rank": 2, **changes})
    monkeypatch.setattr(weights.DeviceMemory, "available", lambda self, sharing: 1000 // sharing)
    with pytest.raises(Refused, match=r"needs whole weights on every rank: 0\.0 GB") as refused:
        ShardedHFModel(_base(tmp_path, "llama"), Ranks(0, 2, local=2)).trainable(settings, seed=1, state_bytes=16)
    assert refused.value.where == f"train.{next(iter(changes))}"


@pytest.mark.parametrize(("setting", "reads"), STARTS.items())
def test_the_page_says_what_each_rank_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, reads: str
) -> None:
    settings = WeightSettings.model_validate({"rank": 2, **yaml.safe_load(setting)})
    monkeypatch.setattr(HFModel, "shard", lambda *given, **named: None)
    model = ShardedHFModel(_base(tmp_path, "llama"), Ranks(0, 2))
    model.trainable(settings, seed=1, state_bytes=16)
    assert model._model is not None
    assert (model._model.late is not None) == (reads == "its rows")
    sizes = [each.untyped_storage().nbytes() for each in model._model.module.parameters() if not each.requires_grad]
    assert (max(sizes) <= 4) == (reads == "its rows"), "weights that are read late take no memory before"
