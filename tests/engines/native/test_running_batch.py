"""The running batch: whoever joins, leaves or waits, each row is given what it would be given alone."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.adapters import write_adapter
from tests.tiny import FAMILIES, TILED, write_model
from tunesmith.core.errors import Refused
from tunesmith.engines.decoding import answers
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.adapters.adapter import PackedAdapter, read_adapter
from tunesmith.engines.native.decoding import running_batch
from tunesmith.engines.native.decoding.running_batch import PAGE, PageCache, Prefix, Row, RunningBatch
from tunesmith.engines.native.network import passes
from tunesmith.engines.native.network.network import Layer, Network, Shape
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.native.runtime import LargePages
from tunesmith.engines.protocol import Generation
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store

END = 1


class Heard:
    """A listener that keeps what it is told and ends at ends_after tokens."""

    def __init__(self, ends_after: int = 10**6) -> None:
        self.tokens: list[int] = []
        self.scores: list[list[list[float]] | None] = []
        self.ended: list[BaseException | None] = []
        self._ends_after = ends_after

    def take(self, token: int, logprobs: Tensor | None) -> bool:
        self.tokens.append(token)
        self.scores.append(None if logprobs is None else [each.tolist() for each in logprobs.topk(2)])
        return len(self.tokens) >= self._ends_after

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        self.ended.append(error)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return load_network(write_model(tmp_path_factory.mktemp("m") / "qwen3", "qwen3"), torch.float32)


def _adapters(folder: Path, family: str, network: Network, **each: dict[str, int]) -> dict[str, PackedAdapter]:
    base = resolve_base(Store(folder / "store"), str(folder / family), folder)
    made = {}
    for name, how in each.items():
        path = write_adapter(folder / name, base, strength=0.5, **how)
        made[name] = read_adapter(path, network, base)
    return made


def _row(ids: list[int], heard: Heard, limit: int = 8, **more: object) -> Row:
    how = {"request": Generation(()), **more}
    return Row(ids=ids, limit=limit, listener=heard, **how)  # type: ignore[arg-type]


def _decoded(network: Network, *rows: Row, **how: object) -> RunningBatch:
    """The batch that decoded the rows to their ends."""
    batch = RunningBatch(network, frozenset({END}), **how)  # type: ignore[arg-type]
    batch.waiting.extend(rows)
    while batch:
        batch.step()
    return batch


def _alone(network: Network, ids: list[int], limit: int = 8, **more: object) -> list[int]:
    heard = Heard()
    _decoded(network, _row(ids, heard, limit, **more))
    assert heard.ended == [None]
    return heard.tokens


def _prompt(seed: int, length: int) -> list[int]:
    return torch.randint(2, 280, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_that_join_and_end_decode_as_in_transformers(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / family, family)
    network = load_network(folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shared = _prompt(0, 40)
    prefix = Prefix(tuple(shared), None)
    batch = RunningBatch(network, frozenset({END}), most_rows=3)
    asked = [(_prompt(seed, 3 + 7 * seed), seed % 2 == 0, 2 + 5 * (seed % 3)) for seed in range(1, 8)]
    heard = [Heard() for _ in asked]
    rows = [
        _row(own, told, limit, prefix=prefix if behind else None)
        for (own, behind, limit), told in zip(asked, heard, strict=True)
    ]
    batch.waiting.extend(rows[:4])
    for step in range(200):
        if step == 3:
            batch.waiting.extend(rows[4:])
        batch.step()
        assert len(batch.rows) <= 3
    assert not batch
    for (own, behind, limit), told in zip(asked, heard, strict=True):
        ids = torch.tensor([[*(shared if behind else ()), *own]])
        given = model.generate(ids, max_new_tokens=limit, do_sample=False, pad_token_id=END)[0, ids.shape[1] :]
        assert told.tokens == [token for token in given.tolist() if token != END]


@pytest.mark.parametrize("family", ["qwen2"])
def test_rows_of_several_adapters_decode_as_alone(tmp_path: Path, family: str) -> None:
    network = load_network(write_model(tmp_path / family, family), torch.float32)
    adapters = _adapters(tmp_path, family, network, a={"rank": 4, "seed": 1}, b={"rank": 7, "seed": 2})
    a, b = adapters["a"], adapters["b"]
    some = {place: pair for place, pair in b.factors.items() if place[0] == 1}
    factors = {place: torch.full((network.layers[place[0]].linear[place[1]].out,), 1.5) for place in some}
    every = [None, a, b, PackedAdapter(some, {}), PackedAdapter(some, factors)]  # one layer alone; with DoRA's lengths
    asked = [(_prompt(seed, 5 + seed), every[seed % len(every)]) for seed in range(10)]
    expected = [_alone(network, ids, adapter=adapter) for ids, adapter in asked]
    assert len({tuple(_alone(network, asked[0][0], adapter=adapter)) for adapter in every}) == len(every)
    heard = [Heard() for _ in asked]
    _decoded(network, *(_row(ids, told, adapter=one) for (ids, one), told in zip(asked, heard, strict=True)))
    assert [told.tokens for told in heard] == expected


def test_more_adapters_than_fit_a_batch_take_turns(tmp_path: Path, network: Network) -> None:
    few = PackedAdapter({}, {})
    several = [PackedAdapter(few.factors, few.row_scales) for _ in range(11)]
    heard = [Heard() for _ in several]
    batch = RunningBatch(network, frozenset({END}))
    batch.waiting.extend(_row(_prompt(3, 4), told, adapter=one) for one, told in zip(several, heard, strict=True))
    while batch:
        batch.step()
        assert len({row.adapter for row in batch.rows}) <= 8
    assert {tuple(told.tokens) for told in heard} == {tuple(_alone(network, _prompt(3, 4)))}


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    long, short = _prompt(1, 400), _prompt(2, 5)
    expected = _alone(network, long), _alone(network, short)
    prefixed = _alone(network, long[200:], prefix=Prefix(tuple(long[:200]), None))
    assert prefixed == expected[0]
    monkeypatch.setattr(running_batch, "_CHUNK", 48)
    heard = [Heard(), Heard()]
    batch = RunningBatch(network, frozenset({END}))
    batch.waiting.extend((_row(long, heard[0]), _row(short, heard[1])))
    for _ in range(4):
        batch.step()
    assert heard[1].tokens, "the short one has begun"
    assert not heard[0].tokens
    while batch:
        batch.step()
    assert (heard[0].tokens, heard[1].tokens) == expected
    assert _alone(network, long[200:], prefix=Prefix(tuple(long[:200]), None)) == expected[0]


def test_pages_are_allocated_in_order_within_the_bound(network: Network) -> None:
    cache = PageCache(network, 100 * PageCache(network, 0).page_bytes)
    held = [cache.allocate(places) for places in (PAGE, PAGE + 1, 70 * PAGE)]
    assert held == [[0], [1, 2], list(range(3, 73))], "whole pages for each row"
    assert cache.allocate(28 * PAGE) is None
    assert cache.allocate(200 * PAGE) is None, "not while others hold some"
    rest = cache.allocate(27 * PAGE)
    assert rest == list(range(73, 100))
    assert (cache.pages, cache.allocated) == (100, 100)
    for end in (lambda: cache.free(range(200)), cache.clear):
        cache.clear()
        assert cache.allocate(200 * PAGE) == list(range(200)), "more than the bound, for one row"
        assert cache.allocate(1) is None
        end()
        assert (cache.pages, cache.allocated) == (0, 0)


def test_errors_end_one_row_or_the_whole_batch(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    class Bad(Heard):
        def take(self, token: int, logprobs: Tensor | None) -> bool:
            raise ValueError("mine alone")

    def broken(*_: object) -> int:
        raise RuntimeError("no probabilities")  # as of logits that are NaN

    alone = _alone(network, _prompt(1, 9))
    near_zero = [
        _alone(network, _prompt(1, 9), request=Generation((), temperature=each)) for each in (1e-3, 1e-40, 1e-300)
    ]
    assert near_zero == [alone] * 3
    monkeypatch.setattr(answers, "sample", broken)
    good, bad, drawn = Heard(), Bad(), Heard()
    asked = _row(_prompt(2, 9), drawn, request=Generation((), temperature=0.7))
    batch = _decoded(network, _row(_prompt(6, 5), bad), asked, _row(_prompt(1, 9), good))
    assert [str(error) for error in (*bad.ended, *drawn.ended)] == ["mine alone", "no probabilities"]
    assert (good.ended, good.tokens) == ([None], alone)
    others, told = [Heard(), Heard()], Heard()
    batch.waiting.extend(_row(_prompt(1, 9), each) for each in others)
    batch.step()
    with torch.inference_mode():
        for cache in (*batch.cache.keys, *batch.cache.values):
            cache[batch.rows[0].pages] = float("nan")
    batch.fail(MemoryError("no"))
    assert all(isinstance(each.ended[0], MemoryError) for each in others)
    assert (batch.cache.allocated, bool(batch)) == (0, False)
    batch.waiting.append(_row(_prompt(1, 9), told))
    while batch:
        batch.step()
    assert told.tokens == alone, "pages are cleared after an error"


def test_a_row_fails_alone_if_there_is_no_memory_for_it(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    page = PageCache(network, 0).page_bytes
    given = LargePages.zeros

    def few(pages: LargePages, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if shape[0] > 40:
            raise OSError(12, "Cannot allocate memory")
        return given(pages, shape, dtype)

    monkeypatch.setattr(LargePages, "zeros", few)
    batch = RunningBatch(network, frozenset({END}), cache_bytes=100 * page)
    heard = [Heard(), Heard(), Heard()]
    batch.waiting.append(_row(_prompt(1, 9), heard[0]))
    batch.waiting.append(_row(_prompt(2, 9), heard[1], limit=50 * PAGE))
    batch.waiting.append(_row(_prompt(3, 9), heard[2]))
    for _ in range(40):
        batch.step()
    assert batch.cache.pages == 25, "as much of a hundred as there is"
    assert heard[0].tokens == _alone(network, _prompt(1, 9))
    assert [error.what for error in heard[1].ended if isinstance(error, Refused)] == [
        f"there is no memory for {51 * PAGE} places of keys and values, {51 * page / 1e6:.0f} MB"
    ]
    assert heard[2].tokens == _alone(network, _prompt(3, 9))


def test_rows_wait_in_order_for_places_that_others_leave(network: Network) -> None:
    """Two rows fill the four pages there are. Of rows that leave, one is decoded and one waits."""
    batch = RunningBatch(network, frozenset({END}), most_rows=3, cache_bytes=4 * PageCache(network, 0).page_bytes)
    heard, prefix = [Heard(ends_after=9) for _ in range(7)], Prefix(tuple(_prompt(77, 20)), None)
    asked = [(_prompt(seed, 20 + seed), prefix if seed % 3 == 2 else None) for seed in range(7)]
    rows = [_row(ids, told, PAGE, prefix=behind) for (ids, behind), told in zip(asked, heard, strict=True)]
    batch.waiting.extend(rows)
    left, gone = list(rows), (rows[0], rows[3])
    while batch:
        batch.step()
        if heard[0].tokens and rows[0] in left:
            batch.drop(gone)
            left = [row for row in rows if row not in gone]
            assert batch.rows == left[:1]
            batch.step()
        left = [row for row in left if not row.listener.ended]  # type: ignore[attr-defined]
        assert [*batch.rows, *batch.waiting] == left, "nobody overtakes"
        held = [page for row in batch.rows for page in row.pages]
        assert len(held) == len({*held}) == batch.cache.allocated <= 4
    for row, told, (ids, behind) in zip(rows, heard, asked, strict=True):
        own = None if behind is None else Prefix(behind.ids, None)
        assert told.ended == ([] if row in gone else [None])
        assert told.tokens == _alone(network, ids, PAGE, prefix=own)[: 9 if row not in gone else len(told.tokens)]


# A pass in one native call gives what the same kernels give when Python calls them one by one, to the bit


needs_tiles = pytest.mark.skipif(
    native.library() is None or native.library().tiles() != 1, reason="no tiles in this processor"
)


@dataclass(frozen=True)
class NewShape(Shape):
    parallel_mlp: bool = False


@dataclass(frozen=True)
class NewLayer(Layer):
    attention_sink: torch.Tensor | None = None


@pytest.fixture(params=["llama", "qwen2"])
def tiled(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_model(tmp_path / request.param, request.param, sizes=TILED)


def _given(
    network: Network, adapters: list[PackedAdapter | None], most_rows: int = 6
) -> list[list[tuple[int, object]]]:
    """Tokens and scores of rows that come and go, some behind a prefix, some long, while memory grows."""
    prefix = Prefix(tuple(_prompt(0, 40)), adapters[0])
    batch = RunningBatch(network, frozenset({END}), most_rows)
    heard, scored = [Heard() for _ in range(12)], Generation((), top_logprobs=2)
    rows = []
    for seed, told in enumerate(heard):
        adapter = adapters[seed % len(adapters)]
        behind = prefix if adapter is adapters[0] and seed % 2 == 0 else None
        length = 90 if seed == 7 else 3 + 5 * seed
        rows.append(
            _row(_prompt(seed + 1, length), told, 30 + 9 * seed, prefix=behind, adapter=adapter, request=scored)
        )
    step = 0
    while rows or batch:
        if step % 5 == 0:
            batch.waiting.extend(rows[:3])
            del rows[:3]
        batch.step()
        step += 1
    assert all(told.ended == [None] for told in heard)
    return [list(zip(told.tokens, told.scores, strict=True)) for told in heard]


@needs_tiles
@pytest.mark.parametrize("ranks", [(None,), (4,), (4, None, 7)], ids=str)
def test_a_native_pass_equals_its_kernels(
    tiled: Path, ranks: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the base, with one adapter, with several."""
    network = load_network(tiled)
    made = _adapters(tiled.parent, tiled.name, network, **{f"a{n}": {"rank": n, "seed": n} for n in ranks if n})
    adapters = [made.get(f"a{rank}") for rank in ranks]
    runs: list[int] = []
    whole = passes.Pass.run
    monkeypatch.setattr(passes.Pass, "run", lambda *told: runs.append(1) or whole(*told))
    found = _given(network, adapters)
    assert runs
    monkeypatch.setattr(running_batch, "fits", lambda _: False)
    runs.clear()
    assert found == _given(network, adapters)
    assert not runs


@needs_tiles
def test_numbers_do_not_depend_on_other_rows(tiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: whichever rows are in a pass, and wherever it divides a prompt."""
    network = load_network(tiled)
    made = _adapters(tiled.parent, tiled.name, network, a={"rank": 4, "seed": 4}, b={"rank": 7, "seed": 7})
    adapters = [None, *made.values()]
    together = _given(network, adapters)
    monkeypatch.setattr(running_batch, "_CHUNK", 23)
    assert _given(network, adapters) == together
    assert _given(network, adapters, most_rows=1) == together


@needs_tiles
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
        {"shape": NewShape(**vars(shape), parallel_mlp=True)},
        {"layers": (*network.layers[:-1], NewLayer(**vars(layer), attention_sink=layer.mlp_norm))},
    ):
        assert not passes.fits(replace(network, **change))  # type: ignore[arg-type]
