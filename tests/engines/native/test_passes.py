"""A pass in one native call gives what the same kernels give when Python calls them one by one, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from tests.adapters import write_adapter
from tests.engines.native.test_running_batch import END, Heard, _prompt, _row
from tests.tiny import TILED, write_model
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.adapters.adapter import PackedAdapter, pack, read_adapter
from tunesmith.engines.native.decoding import running_batch
from tunesmith.engines.native.decoding.rows import Prefix
from tunesmith.engines.native.decoding.running_batch import RunningBatch
from tunesmith.engines.native.network import passes
from tunesmith.engines.native.network.network import Layer, Network, Shape
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store

pytestmark = [
    pytest.mark.usefixtures("compiled_kernels"),
    pytest.mark.skipif(
        native.library() is not None and native.library().tiles() != 1, reason="no tiles in this processor"
    ),
]


@dataclass(frozen=True)
class NewShape(Shape):
    parallel_mlp: bool = False


@dataclass(frozen=True)
class NewLayer(Layer):
    attention_sink: torch.Tensor | None = None


@pytest.fixture(params=["llama", "qwen2"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_model(tmp_path / request.param, request.param, sizes=TILED)


def _adapter(folder: Path, network: Network, name: str, **how: int) -> PackedAdapter:
    base = resolve_base(Store(folder.parent / "store"), str(folder), folder.parent)
    return pack(network, read_adapter(write_adapter(folder.parent / name, base, strength=0.5, **how), network, base))


def _given(
    network: Network, adapters: list[PackedAdapter | None], most_rows: int = 6
) -> list[list[tuple[int, object]]]:
    """Tokens and scores of rows that come and go, some behind a prefix, some long, while memory grows."""
    prefix = Prefix(tuple(_prompt(0, 40)), adapters[0])
    batch = RunningBatch(network, frozenset({END}), most_rows)
    heard = [Heard() for _ in range(12)]
    rows = []
    for seed, told in enumerate(heard):
        adapter = adapters[seed % len(adapters)]
        behind = prefix if adapter is adapters[0] and seed % 2 == 0 else None
        length = 90 if seed == 7 else 3 + 5 * seed
        rows.append(_row(_prompt(seed + 1, length), told, 30 + 9 * seed, prefix=behind, adapter=adapter, top=2))
    step = 0
    while rows or batch:
        if step % 5 == 0:
            batch.waiting.extend(rows[:3])
            del rows[:3]
        batch.step()
        step += 1
    assert all(told.ended == [None] for told in heard)
    return [list(zip(told.tokens, told.scores, strict=True)) for told in heard]


@pytest.mark.parametrize("ranks", [(None,), (4,), (4, None, 7)], ids=str)
def test_a_native_pass_equals_its_kernels(
    folder: Path, ranks: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the base, with one adapter, with several."""
    network = load_network(folder)
    adapters = [None if rank is None else _adapter(folder, network, f"a{rank}", rank=rank, seed=rank) for rank in ranks]
    runs: list[int] = []
    whole = passes.Pass.run
    monkeypatch.setattr(passes.Pass, "run", lambda *told: runs.append(1) or whole(*told))
    found = _given(network, adapters)
    assert runs
    monkeypatch.setattr(running_batch, "fits", lambda _: False)
    runs.clear()
    assert found == _given(network, adapters)
    assert not runs


def test_numbers_do_not_depend_on_other_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: whichever rows are in a pass, and wherever it divides a prompt."""
    network = load_network(folder)
    adapters = [None, *(_adapter(folder, network, name, rank=rank, seed=rank) for name, rank in (("a", 4), ("b", 7)))]
    together = _given(network, adapters)
    monkeypatch.setattr(running_batch, "_CHUNK", 23)
    assert _given(network, adapters) == together
    assert _given(network, adapters, most_rows=1) == together


def test_native_passes_fit_networks_like_llama_only(tmp_path: Path) -> None:
    """What pass.cpp does not know must not be ignored: another value of a field, or a new field."""
    families = ("qwen2", "qwen3", "mistral-window", "gemma", "gemma2", "smollm3", "llama")
    loaded = {name: load_network(write_model(tmp_path / name, name, sizes=TILED)) for name in families}
    assert [name for name, network in loaded.items() if passes.fits(network)] == ["qwen2", "llama"]
    assert not passes.fits(load_network(tmp_path / "llama", torch.float32))
    network = loaded["llama"]
    shape, layer = network.shape, network.layers[0]
    for change in (
        {"shape": replace(shape, gelu="relu")},  # type: ignore[arg-type]
        {"shape": NewShape(**{field.name: getattr(shape, field.name) for field in fields(shape)})},
        {"layers": (*network.layers[:-1], NewLayer(**{one.name: getattr(layer, one.name) for one in fields(layer)}))},
    ):
        assert not passes.fits(replace(network, **change))  # type: ignore[arg-type]
