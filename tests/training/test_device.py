"""Training and decoding on a device that is not the processor: nothing is left behind, and seeds mean the same.

There: a stand-in whose numbers PyTorch's CPU kernels compute, and which refuses what a GPU refuses (tests/standin.py).
Its results are those of the portable path on the processor. Where there is a GPU, the same runs on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import standin
from tests.tiny import FAMILIES, row, write_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT
from tunesmith.inference import embedded, equality, fingerprint
from tunesmith.inference.embedded import EmbeddedEngine
from tunesmith.inference.engine import Completion, Generation, Question
from tunesmith.models import native, ops, products, runtime
from tunesmith.models.adapter import WEIGHTS_FILE
from tunesmith.models.base import resolve_base
from tunesmith.models.merging import write_merged
from tunesmith.models.network import forward
from tunesmith.models.products import Frozen
from tunesmith.models.rendering import Renderer
from tunesmith.models.weights import load_network
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training import loop, speed
from tunesmith.training.batches import lay_out_step
from tunesmith.training.full import Full
from tunesmith.training.loop import gradients, make_optimizer, update, validation_loss
from tunesmith.training.lora import Lora
from tunesmith.training.machines import joined
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import Job, TrainingRow, train, train_together

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = [pytest.param(standin.DEVICE, id="stand-in"), pytest.param(torch.device("cuda", 0), id="gpu", marks=GPU)]
ROWS = [TrainingRow(f"r{n}", row(f"turn on light {n}" + " now" * (n % 5), f'{{"n":{n}}}')) for n in range(12)]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "dora": True},
    "pissa": {"rank": 4, "start": "pissa"},
    "full": {"method": "full"},
    "last-layer": {"method": "full", "layers": 1},
}


@pytest.fixture
def portable() -> Iterator[None]:
    """The processor without compiled kernels: the arithmetic that other devices run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        patch.setattr(native, "identity", lambda: "portable")
        patch.setattr(products, "_tile_library", lambda: None)
        patch.setattr(products, "_packs", lambda _: False)
        yield


def _on(patch: pytest.MonkeyPatch, device: torch.device) -> None:
    patch.setattr(runtime, "device", lambda: device)


def _close(found: Tensor, expected: Tensor) -> None:
    assert found.device.type != "cpu"
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-5)


def _one_step(folder: Path, device: torch.device, settings: TrainSettings) -> tuple[Any, float, list[Tensor], float]:
    """The weights under training after one step of two parts; its loss, its gradients, the loss afterwards."""
    network, renderer = load_network(folder, torch.float32, on=device), Renderer(folder)
    trained = Full(network, settings, folder) if settings.method == "full" else Lora(network, settings)
    step = lay_out_step([renderer.conversation(each.messages) for each in ROWS[:6]], 120)
    assert len(step) > 1
    assert any(part.prefix for part in step)
    loss = gradients(trained.network, trained, step)
    found = [master.grad.clone() for master in trained.masters if master.grad is not None]
    optimizer = make_optimizer(trained, settings)
    update(trained, optimizer, settings.learning_rate, settings.clip)
    return trained, loss, found, validation_loss(trained.network, trained, step)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_processor(tmp_path: Path, portable: None, method: str, device: torch.device) -> None:
    folder = write_model(tmp_path / "m", "qwen2")
    settings = TrainSettings(learning_rate=0.01, **METHODS[method])
    here, there = (_one_step(folder, each, settings) for each in (runtime.CPU, device))
    assert there[1] == pytest.approx(here[1], rel=1e-5)
    assert there[3] == pytest.approx(here[3], rel=1e-4)
    assert len(there[2]) == len(here[2]) == len(here[0].masters)
    for found, expected in zip(there[2], here[2], strict=True):
        _close(found, expected)
    if device == standin.DEVICE:  # AdamW's first step is little but signs, which other rounding turns
        for found, expected in zip(there[0].masters, here[0].masters, strict=True):
            _close(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_there(tmp_path: Path, portable: None, family: str, device: torch.device) -> None:
    folder, settings = write_model(tmp_path / "m", family), TrainSettings(rank=4, learning_rate=0.01)
    here, there = (_one_step(folder, each, settings) for each in (runtime.CPU, device))
    assert there[1] == pytest.approx(here[1], rel=1e-5)
    for found, expected in zip(there[2], here[2], strict=True):
        _close(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_mean_the_same(tmp_path: Path, device: torch.device) -> None:
    folder = write_model(tmp_path / "m")
    for start in ("zero", "pissa"):
        settings = TrainSettings(rank=4, seed=3, start=start)
        here, there = (Lora(load_network(folder, torch.float32, on=each), settings) for each in (runtime.CPU, device))
        for found, expected in zip(there.masters, here.masters, strict=True):
            assert torch.equal(found.cpu(), expected)


def test_a_step_waits_for_the_device_once_a_part_and_once_for_its_norm(tmp_path: Path) -> None:
    folder, counts = write_model(tmp_path / "m"), []
    for layers in (1, 3):
        lora = Lora(load_network(folder, torch.float32, on=standin.DEVICE), TrainSettings(rank=4, layers=layers))
        optimizer = make_optimizer(lora, TrainSettings())
        step = lay_out_step([Renderer(folder).conversation(each.messages) for each in ROWS[:6]], 120)
        before = standin.waits()
        gradients(lora.network, lora, step)
        update(lora, optimizer, 0.01, 1.0)
        counts.append(standin.waits() - before)
    assert counts == [len(step) + 1] * 2


def test_a_token_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, layers and windows there are."""
    for family in ("qwen3", "gemma2"):
        write_model(tmp_path / family, family)
        _on(monkeypatch, standin.DEVICE)
        engine = EmbeddedEngine(resolve_base(Store(tmp_path / "store"), family, tmp_path))
        monkeypatch.setattr(engine._scheduler._batch, "_stop_ids", frozenset())
        counts = []
        for tokens in (4, 9):
            before = standin.waits()
            engine.generate([Generation(each.messages[:2], max_tokens=tokens) for each in ROWS[:4]])
            counts.append(standin.waits() - before)
        assert counts[1] - counts[0] == 9 - 4


def test_the_limit_is_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.device] = []

    class Seen(Frozen):
        def __call__(self, x: Tensor, *more: Any) -> Tensor:
            multiplied.append(x.device)
            return super().__call__(x, *more)

    monkeypatch.setattr(speed, "Frozen", Seen)
    assert speed.matrix_limit(load_network(write_model(tmp_path / "m"), on=standin.DEVICE), 7) > 0
    assert set(multiplied) == {standin.DEVICE}


SETTINGS = TrainSettings(rank=4, batch=6, epochs=2, learning_rate=0.01, validations=2, checkpoint_seconds=1e-9)


def _trained(folder: Path, settings: TrainSettings = SETTINGS) -> tuple[dict[str, Any], bytes]:
    """Train in folder; the training record's body, and the bytes of its weights."""
    if not (folder / "model").is_dir():
        write_model(folder / "model")
    store = Store(folder / "store")
    base = resolve_base(store, str(folder / "model"), folder)
    dataset = store.put_record(Record(kind="dataset", body={"rows": len(ROWS)}))
    given = {"base": base, "dataset": dataset, "rows": ROWS, "validation": ROWS[:3]}
    record = store.record(train(store, **given, settings=settings, work=folder / "work"))
    (digest,) = (digest for name, digest in record.blobs.items() if name.endswith(".safetensors"))
    return record.body, store.read_blob(digest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_there_and_its_resume(
    tmp_path: Path, portable: None, monkeypatch: pytest.MonkeyPatch, method: str, device: torch.device
) -> None:
    """In bf16, as trainings are: close to the processor's losses, and after a stop the same bytes."""
    settings = SETTINGS if method == "lora" else SETTINGS.model_copy(update={"method": "full", "learning_rate": 0.001})
    here, _ = _trained(tmp_path / "here", settings)
    _on(monkeypatch, device)
    body, weights = _trained(tmp_path / "there", settings)
    near = 0.02 if device == standin.DEVICE else 0.1  # bf16 is rounded elsewhere there
    for curve in ("curve", "validation"):
        expected = [point["loss"] for point in here[curve]]
        assert [point["loss"] for point in body[curve]] == pytest.approx(expected, rel=near)
    assert "device" not in here["environment"]
    assert body["environment"]["device"] == runtime.name_of(device)
    assert body["environment"]["kernels"] == "portable"

    with monkeypatch.context() as patch:
        _stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            _trained(tmp_path / "stopped", settings)
    with monkeypatch.context() as patch:
        _on(patch, runtime.CPU)
        with pytest.raises(Refused, match="other environment"):
            _trained(tmp_path / "stopped", settings)
    assert _trained(tmp_path / "stopped", settings)[1] == weights


def _stop_after(patch: pytest.MonkeyPatch, checkpoints: int) -> None:
    real, written = loop.save_checkpoint, []

    def save(*given: Any) -> None:
        real(*given)
        written.append(1)
        if len(written) == checkpoints:
            raise KeyboardInterrupt

    patch.setattr(loop, "save_checkpoint", save)


def test_several_adapters_there_are_each_as_alone(
    tmp_path: Path, portable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on(monkeypatch, standin.DEVICE)
    _, alone = _trained(tmp_path / "alone")
    write_model(tmp_path / "model")
    store = Store(tmp_path / "store")
    base = resolve_base(store, str(tmp_path / "model"), tmp_path)
    dataset = store.put_record(Record(kind="dataset", body={"rows": len(ROWS)}))
    other = SETTINGS.model_copy(update={"rank": 8, "seed": 2})
    jobs = [Job(str(n), ROWS, ROWS[:3], each, tmp_path / str(n)) for n, each in enumerate((SETTINGS, other))]
    first, second = train_together(store, base=base, dataset=dataset, jobs=jobs)
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert store.read_blob(store.record(first).blobs[WEIGHTS_FILE]) == alone
    assert store.record(second).body["final_loss"] > 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_room_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda on=runtime.CPU: 100 if on == standin.DEVICE else 1 << 40)
    settings = SETTINGS if method == "lora" else TrainSettings(method="full")
    _trained(tmp_path / "here", settings)
    _on(monkeypatch, standin.DEVICE)
    with pytest.raises(Refused, match=r"0\.0 GB are free"):
        _trained(tmp_path / "there", settings)


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch keeps for itself and does not use is free too."""
    gpu = torch.device("cuda", 0)
    figures = {
        "mem_get_info": (500, 1000),
        "memory_reserved": 300,
        "memory_allocated": 120,
        "max_memory_allocated": 250,
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda on, value=value: value)
    assert runtime.available_memory(gpu) == 500 + 300 - 120
    assert runtime.peak_memory(gpu) == 250
    assert runtime.available_memory() > 1 << 20


def _asked(engine: EmbeddedEngine) -> tuple[list[Completion], list[float]]:
    """What an engine with adapters `a`, `b` and `dora` says, greedy and drawn, held to a schema, alone, in company and
    under several adapters at once; and every log-probability in it."""
    prompts = [each.messages[:2] for each in ROWS[:3]]
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"temperature": 1.0, "seed": 6}]
    requests = [Generation(prompt, max_tokens=6, **how) for prompt in prompts for how in ways]
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    held = Generation(prompts[0], max_tokens=6, schema=schema, top_logprobs=2)
    questions = [Question(prompts[1], ("on", "off")), Question(prompts[2], ("1", "22", "3"))]
    said = engine.generate([*requests, held]) + engine.generate([*requests, held], "dora")
    long = (Message(role="user", content="turn on the kitchen light " * 120),)  # read in parts
    assert engine.count_tokens(long) > 512
    said += engine.generate([Generation(long, max_tokens=3)])
    last = list(engine.stream(requests[0], "a"))[-1]
    assert isinstance(last, Completion)
    said += [last, *_at_once(engine, [(one, name) for one in requests[:2] for name in (None, "a", "b", "dora")])]
    chosen = [score for name in (None, "a") for scores in engine.choose(questions, name) for score in scores]
    return said, chosen + [score.logprob for each in said for score in each.scores]


def _at_once(engine: EmbeddedEngine, asked: list[tuple[Generation, str | None]]) -> list[Completion]:
    """Each by a thread of its own, all in one batch."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return [found[0] for found in pool.map(lambda one: engine.generate([one[0]], one[1]), asked)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_answers_there_are_the_processors(
    tmp_path: Path, portable: None, monkeypatch: pytest.MonkeyPatch, family: str, device: torch.device
) -> None:
    write_model(tmp_path / "m", family)
    base = resolve_base(Store(tmp_path / "store"), "m", tmp_path)
    monkeypatch.setattr(embedded, "load_network", lambda folder: load_network(folder, torch.float32))
    for number, (name, more) in enumerate({"a": {}, "b": {"layers": 2}, "dora": {"dora": True}}.items()):
        lora = Lora(load_network(base.folder, torch.float32), TrainSettings(rank=4, **more))
        for master in lora.masters[:2]:
            torch.nn.init.normal_(master, std=0.1, generator=torch.Generator().manual_seed(number))
        (tmp_path / name).mkdir()
        for file, data in lora.files(base).items():
            (tmp_path / name / file).write_bytes(data)

    def answers(on: torch.device) -> tuple[list[Completion], list[float]]:
        with monkeypatch.context() as patch:
            _on(patch, on)
            engine = EmbeddedEngine(base)
            assert engine._network.device == on
            for name in ("a", "b", "dora"):
                engine.load_adapter(name, tmp_path / name)
            return _asked(engine)

    here, there = answers(runtime.CPU), answers(device)
    assert [each.text for each in there[0]] == [each.text for each in here[0]]
    assert there[1] == pytest.approx(here[1], abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_forms_are_compared_with_what_answers_there(
    tmp_path: Path, portable: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The forms themselves are computed on the processor, where transformers computes them."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    _on(monkeypatch, standin.DEVICE)
    folder = write_model(tmp_path / "m")
    base = resolve_base(Store(tmp_path / "store"), "m", tmp_path)
    network = load_network(folder)
    settings = TrainSettings(rank=4, dora=True) if method == "lora" else TrainSettings(method="full")
    trained = Lora(network, settings) if method == "lora" else Full(network, settings, folder)
    with torch.no_grad():
        for master in trained.masters:
            master += 0.01
    (tmp_path / "trained").mkdir()
    for name, data in trained.files(base).items():
        (tmp_path / "trained" / name).write_bytes(data)
    engine = EmbeddedEngine(base)
    engine.load_adapter("a", tmp_path / "trained")
    probes = [equality.Probe(each.id, each.messages[:2]) for each in ROWS[:2]]
    answered = equality.answer_probes(engine, "a", base, probes, 4, SILENT)
    place = tmp_path / "trained"
    if method == "full":
        place = tmp_path / "merged"
        place.mkdir()
        write_merged(base.folder, tmp_path / "trained", place, "fp32")
    form = "peft" if method == "lora" else "merged"
    found = equality.compare(
        engine, "a", base=base, trained=tmp_path / "trained", form=form, exported=place, answered=answered
    )
    assert found["export"]["max_difference"] < equality.TOLERANCE["fp32"]["max"]
    assert found["served"]["max_difference"] < equality.SERVED_TOLERANCE
    ids = fingerprint.text_ids(Renderer(folder))
    there = fingerprint.expected_scores(base, ids)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "other"))
    _on(monkeypatch, runtime.CPU)
    assert fingerprint.apart(there, fingerprint.expected_scores(base, ids)) < 0.01


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    """The stand-in refuses what a GPU refuses: each of these is a way to forget that there is a device."""
    there, here = torch.ones(3, 2).to(standin.DEVICE), torch.ones(3, 2)
    for wrong in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: there @ torch.ones(2, 2),
        lambda: torch.cat((there, here)),
        lambda: torch.stack((there.sum(), here.sum())),
        lambda: there[torch.tensor([0])],
        lambda: there.uniform_(generator=torch.Generator()),
        lambda: there.numpy(),
        lambda: ops.at(there),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (there * torch.tensor(2.0)).cpu().sum() == 12  # a single number is taken along
    lora = Lora(load_network(write_model(tmp_path / "m"), torch.float32, on=standin.DEVICE), TrainSettings(rank=4))
    batch = lay_out_step([Renderer(tmp_path / "m").conversation(each.messages) for each in ROWS[:2]], 500)[0]
    hidden = forward(lora.network, batch.ids.to(standin.DEVICE), lora.linear(), _seeing_nothing)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        hidden[batch.predicts]


def _seeing_nothing(_layer: int, qkv: Tensor) -> Tensor:
    return qkv[:, : qkv.shape[1] // 2]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cpu:0", "meta"])
def test_a_device_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TUNESMITH_DEVICE", name)
    with pytest.raises(UsageError, match="there is no device") as refused:
        runtime.device()
    assert refused.value.where == "TUNESMITH_DEVICE"
    assert refused.value.fix == "set cpu, cuda or cuda:N"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TUNESMITH_DEVICE", "cuda:1")
    with pytest.raises(UsageError, match="finds no GPU that it can use, so cuda:1 is not there"):
        runtime.device()
    for value in ("cpu", ""):
        monkeypatch.setenv("TUNESMITH_DEVICE", value)
        assert runtime.device() == runtime.CPU


def test_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert runtime.device() == runtime.CPU, "a GPU by choice alone"
    monkeypatch.setenv("TUNESMITH_DEVICE", "cuda")
    assert runtime.device() == torch.device("cuda", 1)
    monkeypatch.setenv("TUNESMITH_DEVICE", "cuda:0")
    assert runtime.device() == torch.device("cuda", 0)
    monkeypatch.setenv("TUNESMITH_DEVICE", "cuda:2")
    with pytest.raises(UsageError, match="there is no device cuda:2: PyTorch finds 2"):
        runtime.device()


def test_processes_share_a_training_on_processors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, standin.DEVICE)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="on their processors alone"), joined():
        pass
