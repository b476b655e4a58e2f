"""Trainings of both engines, compared with PEFT and a plain torch loop, on tiny random models; what hf refuses."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.hf_models import OF_2026, base_of_family, change_adapter, write_hf_model
from tests.tiny import FAMILIES, ROWS, WIDE, row
from tests.trained import batch_loss, gradients, reference_loss, saved, validation_loss
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines import factory
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.factory import check_weight_settings, engine_kind
from tunesmith.engines.hf import libraries, support
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.native import engine as native_engine
from tunesmith.engines.native.engine import NativeModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import LoadedModel, TrainableModel
from tunesmith.models.base import Base, count_parameters, resolve_base
from tunesmith.models.rendering import LossOn, Rendered, Renderer
from tunesmith.models.weight_files import ADAPTER_FILE, MODEL_FILE, read_adapter_file
from tunesmith.store.store import Store
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer, parameters, update

Turns = tuple[Message, ...]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FOUR_BITS = {"quantize": "4bit"}


@pytest.fixture(autouse=True)
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine in fp32, so that what differs is a mistake and not rounding."""
    monkeypatch.setattr(native_engine, "load_network", lambda folder, **how: load_network(folder, torch.float32, **how))


def _loaded(base: Base, engine: str = "hf") -> LoadedModel:
    return LoadedHFModel(base) if engine == "hf" else NativeModel(base)


def _trained_by(engine: str, base: Base, seed: int = 0, **settings: Any) -> TrainableModel:
    weights = WeightSettings.model_validate(settings if "method" in settings else {"rank": 4, **settings})
    return _loaded(base, engine).trainable(weights, seed=seed, state_bytes=16)


def _trainable(base: Base, seed: int = 0, **settings: Any) -> HFTrainable:
    made = _trained_by("hf", base, seed, **settings)
    assert isinstance(made, HFTrainable)
    return made


def _rows(
    base: Base, loss_on: LossOn = "assistant", conversations: Sequence[tuple[Message, ...]] = ROWS
) -> list[Rendered]:
    renderer = Renderer(base.folder)
    return [renderer.conversation(messages, loss_on) for messages in conversations]


def _model(base: Base, quantize: str | None = None) -> Any:
    """The base in transformers' modules. No dropout is applied."""
    how: dict[str, Any] = {}
    if quantize is not None:
        bits: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **bits)
        how = {"quantization_config": config, "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, **how).eval()


def _served_loss(base: Base, folder: Path, engine: str) -> float:
    """The mean loss of ROWS' answers by an engine that has read a training's files."""
    answering = _loaded(base, engine).engine()
    answering.load_adapter("tuned", folder)
    asked = [Question(messages[:-1], (messages[-1].content,)) for messages in ROWS]
    return -sum(scores[0] for scores in answering.choose(asked, "tuned")) / sum(map(label_count, _rows(base)))


def _engines(base: Base) -> list[str]:
    return ["hf", "native"] if engine_kind(base) == "native" else ["hf"]


ADAPTERS: list[tuple[str, str, dict[str, Any]]] = [
    *(("native", family, {}) for family in FAMILIES),
    *(("portable", family, {}) for family in ("llama", "gemma2")),
    *(("hf", family, {}) for family in ("gpt2", "gpt_neox", "opt", "falcon", "phi3", "stablelm", "olmo2", "granite")),
    *(("hf", family, {}) for family in ("cohere", "llama", "gemma3")),  # two are trained by both engines
    *(("hf", family, {"targets": ATTENTION}) for family in ("mixtral", "qwen3_moe")),
    ("hf", "qwen2", FOUR_BITS),
    *(("hf", "gpt2", each) for each in ({"dora": True, "b_rate": 4.0}, {"attention": "eager"})),
    ("native", "llama", {"b_rate": 4.0}),
    ("hf", "phi3", {"precision": "bf16"}),
]


@pytest.mark.parametrize(("engine", "family", "settings"), ADAPTERS, ids=str)
def test_an_adapter_learns_as_in_peft(
    tmp_path: Path, portable: Callable[[], None], engine: str, family: str, settings: dict[str, Any]
) -> None:
    if engine == "portable":
        portable()
    base = base_of_family(tmp_path, family, **({"sizes": WIDE} if settings == FOUR_BITS else {}))
    rows, ours, quantize = _rows(base), _trained_by(engine, base, **settings), settings.get("quantize")
    plain = _model(base, quantize)
    if not settings:
        assert count_parameters(base.folder) == plain.num_parameters()
        every = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        assert ours.trained_numbers == get_peft_model(_model(base), every).get_nb_trainable_parameters()[0]
    theirs = PeftModel.from_pretrained(plain, str(saved(ours, tmp_path / "start")), is_trainable=True)
    theirs.train(quantize is not None)  # else gradients, without dropout
    trained = [each for each in theirs.parameters() if each.requires_grad]
    assert ours.trained_numbers == sum(each.numel() for each in trained)
    batches = [lay_out(rows[:2], share=ours.shares_prefix), lay_out(rows[2:], share=ours.shares_prefix)]
    assert {each.dtype for each in parameters(ours)} == {torch.float32}
    stated = {key: settings[key] for key in ("attention", "precision") if key in settings}
    assert stated.items() <= ours.environment().items()
    one = make_optimizer(ours, TrainSettings(learning_rate=0.01, weight_decay=0.0))
    two = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    if "b_rate" in settings:
        of_b = {each for name, each in theirs.named_parameters() if "lora_B" in name}
        groups = [{"params": [*({*trained} - of_b)]}, {"params": [*of_b], "lr": 0.01 * settings["b_rate"]}]
        two = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    exact = 0.01 if "precision" in settings else 3e-4 if quantize else 3e-5
    for _ in range(3):
        expected = reference_loss(theirs, rows)
        expected.backward()
        assert validation_loss(ours, batches) == pytest.approx(float(expected.detach()), rel=exact)
        assert gradients(ours, batches) == pytest.approx(float(expected.detach()), rel=exact)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        assert update(ours, one, 0.01, 1.0) == pytest.approx(norm, rel=max(2e-3, 5 * exact))
        two.step()
        two.zero_grad()
    end, state = load_file(saved(ours, tmp_path / "end") / ADAPTER_FILE), get_peft_model_state_dict(theirs)
    assert set(end) == set(state)
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((end[name] - state[name]).abs() > 1e-3).sum()) for name in end)
    assert off <= (0.3 if "precision" in settings else 0.01) * ours.trained_numbers
    if quantize:
        apart = validation_loss(_trainable(base), batches) - float(reference_loss(plain.eval(), rows).detach())
        assert abs(apart) > 1e-3, "4 bits make a difference"
        assert ours.environment()["quantized"].startswith("nf4, blocks of 64, double quantisation, bitsandbytes ")


@pytest.mark.parametrize(
    ("engine", "family", "settings"),
    [
        ("hf", "gpt2", {"dora": True}),
        ("hf", "gpt_neox", {"start": "pissa", "scaling": "root", "alpha": 3.0}),
        ("hf", "opt", {"layers": 1}),
        ("hf", "phi3", {"start": "pissa", "dora": True, "layers": 1}),
        ("hf", "llama", {"dora": True, "targets": ["q_proj", "up_proj"]}),
        ("hf", "qwen2", {"dora": True, "start": "pissa"}),  # with biases, which magnitudes leave alone
        ("native", "llama", {"targets": ["q_proj", "v_proj", "down_proj"]}),
        ("native", "llama", {"layers": 2, "targets": ["v_proj", "down_proj"], "scaling": "root", "alpha": 3.0}),
        ("native", "llama", {"layers": 1}),
        *(("hf", family, {}) for family in OF_2026),
    ],
    ids=str,
)
def test_what_is_trained_is_what_peft_and_the_engines_read(
    tmp_path: Path, engine: str, family: str, settings: dict[str, Any]
) -> None:
    """The released adapter gives the unchanged base what the training computes, also where that began elsewhere."""
    base = base_of_family(tmp_path, family)
    rows, trained = _rows(base), _trained_by(engine, base, **settings)
    batch, optimizer = lay_out(rows, share=trained.shares_prefix), make_optimizer(trained, TrainSettings())
    before = float(reference_loss(_model(base), rows).detach())
    assert validation_loss(trained, [batch]) == pytest.approx(before, rel=1e-4), "it starts as the base"
    for _ in range(6):
        gradients(trained, [batch])
        update(trained, optimizer, 0.02, 1.0)
    after, folder = validation_loss(trained, [batch]), saved(trained, tmp_path / "adapter")
    assert after < before - 0.05
    model = PeftModel.from_pretrained(_model(base), str(folder)).eval()
    assert float(reference_loss(model, rows).detach()) == pytest.approx(after, rel=1e-4)
    for serving in _engines(base):
        assert _served_loss(base, folder, serving) == pytest.approx(after, rel=1e-4), serving
    file = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint)
    assert file.config.rank == (8 if settings.get("start") == "pissa" else 4)
    count = model.config.num_hidden_layers
    assert file.config.layers == (tuple(range(count - settings["layers"], count)) if "layers" in settings else None)


# Full fine-tuning, compared with a plain torch loop. There are more labels than one chunk of the loss has, so that the
# head's gradient is a sum.


MANY = [*ROWS, *(row(f"say {n}", f'{{"n":{n},"said":"{"na" * 40}"}}') for n in range(8))]
RATE, DECAY = 0.003, 0.1


@pytest.mark.parametrize(
    ("engine", "family", "layers"),
    [
        *(("native", family, None) for family in FAMILIES),
        *(("native", family, 2) for family in ("qwen2", "gemma3")),
        *(("hf", family, None) for family in ("llama", "llama-untied", "phi3", "gpt2")),
        ("hf", "llama", 2),
    ],
)
def test_full_training_learns_as_a_plain_loop(tmp_path: Path, engine: str, family: str, layers: int | None) -> None:
    base = base_of_family(tmp_path, family)
    rows, model = _rows(base, conversations=MANY), _model(base)
    if engine == "native":
        # Where the padding token is the end token, transformers leaves a token out that occurs in every row.
        model.get_input_embeddings().padding_idx = None
    learns = dict(model.named_parameters())
    if layers is not None:
        model.requires_grad_(requires_grad=False)
        learns = {n: each for n, each in learns.items() if n.startswith(("model.layers.1", "model.layers.2"))}
    for each in learns.values():
        each.requires_grad_()
    kinds = [[each for each in learns.values() if (each.ndim > 1) is decays] for decays in (True, False)]
    theirs = torch.optim.AdamW(
        [{"params": kinds[0]}, {"params": kinds[1], "weight_decay": 0.0}], RATE, weight_decay=DECAY
    )
    trained = _trained_by(engine, base, method="full", layers=layers)
    assert trained.trained_numbers == sum(each.numel() for each in learns.values())
    ours = make_optimizer(trained, TrainSettings(method="full", learning_rate=RATE, weight_decay=DECAY))
    step = [lay_out(part, share=trained.shares_prefix) for part in (rows[:4], rows[4:])]
    with pytest.raises(TunesmithError, match="no weight changed enough"):
        saved(trained, tmp_path / "trained")
    assert not [*(tmp_path / "trained").iterdir()]
    for turn in range(4):
        expected = reference_loss(model, rows)
        expected.backward()
        assert gradients(trained, step) == pytest.approx(float(expected.detach()), rel=1e-3 if turn else 2e-5)
        for group, kind in zip(trained.parameter_groups(), kinds, strict=True):
            norms = [torch.cat([each.grad.flatten() for each in part]).norm() for part in (group.tensors, kind)]
            assert float(norms[0]) == pytest.approx(float(norms[1]), rel=5e-3 if turn else 1e-4)
        torch.nn.utils.clip_grad_norm_(learns.values(), 1.0)
        theirs.step()
        theirs.zero_grad()
        update(trained, ours, RATE, 1.0)
    folder = saved(trained, tmp_path / "trained")
    end, stored, state = load_file(folder / MODEL_FILE), load_file(base.folder / MODEL_FILE), model.state_dict()
    assert [(each.shape, each.dtype) for each in end.values()] == [(each.shape, each.dtype) for each in stored.values()]
    assert {name for name, each in end.items() if not torch.equal(each, stored[name])} == learns.keys() & end.keys()
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((each - state[name]).abs() > RATE / 10).sum()) for name, each in end.items())
    assert off <= 0.005 * sum(each.numel() for each in end.values())
    loss = float(reference_loss(model, _rows(base)).detach())
    for serving in _engines(base):
        assert _served_loss(base, folder, serving) == pytest.approx(loss, rel=5e-3), serving


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_labels_are_those_of_the_setting(tmp_path: Path, loss_on: LossOn) -> None:
    base = base_of_family(tmp_path, "gpt2")
    rows, trainable = _rows(base, loss_on), _trainable(base)
    expected = float(reference_loss(_model(base), rows).detach())
    for batch in (lay_out(rows), lay_out(rows, share=False)):
        assert gradients(trainable, [batch]) == pytest.approx(expected, rel=1e-5)


def test_targets_and_seed(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    loaded = LoadedHFModel(base)

    def made(seed: int, *targets: str) -> dict[str, torch.Tensor]:
        trainable = loaded.trainable(WeightSettings(rank=2, targets=targets), seed=seed, state_bytes=16)
        return {name.replace(f".{trainable.adapter}", ""): t for name, t in trainable.parameters.items()}

    first, again, other = made(3, "c_attn"), made(3, "c_attn"), made(4, "c_attn")
    assert {name.split(".lora_")[0] for name in first} == {f"transformer.h.{number}.attn.c_attn" for number in range(2)}
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    with pytest.raises(UsageError, match="no linear layer called 'q_proj'"):
        made(3, "q_proj")
    with pytest.raises(UsageError, match="a weight has only 32"):
        _trainable(base, rank=33, start="pissa")
    mamba = base_of_family(tmp_path, "mamba")
    with pytest.raises(Refused, match=r"does not run .*dt_proj as a layer"):
        _trainable(mamba)
    folder = saved(_trainable(mamba, targets=("in_proj", "x_proj")), tmp_path / "adapter")
    assert PeftModel.from_pretrained(_model(mamba), str(folder))
    for family, place in (("mixtral", r"layers\.0"), ("qwen3_moe", r"\(model\.layers\.1\.mlp\.experts\)")):
        experts = base_of_family(tmp_path, family)  # an adapter beside them would learn, and the experts would not
        with pytest.raises(Refused, match=place):
            _trainable(experts)
        with pytest.raises(UsageError, match="no linear layer called 'experts'"):
            _trainable(experts, targets=("experts",))


def test_an_adapter_leaves_the_model_with_its_training(tmp_path: Path) -> None:
    loaded = LoadedHFModel(base_of_family(tmp_path, "gpt2"))
    kept = [name for name, _ in loaded._model.module.named_parameters()]
    trainable = loaded.trainable(WeightSettings(rank=2), seed=0, state_bytes=16)
    assert [name for name, _ in loaded._model.module.named_parameters() if "lora_" in name]
    del trainable
    assert [n.replace(".base_layer", "") for n, _ in loaded._model.module.named_parameters()] == kept
    question = [Question(ROWS[0][:-1], ("on", "off"))]
    before = loaded.engine().choose(question)
    again = loaded.trainable(WeightSettings(rank=2), seed=0, state_bytes=16)
    change_adapter(again)
    assert loaded.engine().choose(question) == before, "the engine does not see the adapter under training"


def test_a_row_as_long_as_the_context_is_trained_on(tmp_path: Path) -> None:
    """The batch's filler reaches beyond the positions that the model has."""
    base = base_of_family(tmp_path, "gpt2")
    ids = tuple(3 + place % 7 for place in range(256))
    long = Rendered(ids, (False, *(True,) * 255))
    trainable, batch = _trainable(base), lay_out([long, _rows(base)[0]], share=False)
    assert torch.isfinite(batch_loss(trainable, batch, 1.0))
    assert trainable.memory_estimate(batch) > 2 * 256 * 4 * trainable._model.vocabulary
    assert trainable.flops(batch) > 0 < trainable.peak_flops(batch)


def _refused(tmp_path: Path, reason: str) -> None:
    base = resolve_base(Store(tmp_path / "store"), str(tmp_path / "m"), tmp_path)
    with pytest.raises(Refused, match=reason):
        HFModel(base)


def test_what_cannot_be_run_safely_is_refused(tmp_path: Path) -> None:
    write_hf_model(tmp_path / "m", "bert")
    _refused(tmp_path, "see later ones")
    folder = write_hf_model(tmp_path / "m", "gpt2")
    config = json.loads((folder / "config.json").read_text())

    def change(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    change(model_type="of_my_own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    _refused(tmp_path, "without code from its folder")
    change(quantization_config={"quant_method": "bitsandbytes"})
    _refused(tmp_path, "quantised")
    change(n_positions=0)
    _refused(tmp_path, "context length")
    change(n_layer=3)
    _refused(tmp_path, "missing keys")
    change(n_layer=1)
    _refused(tmp_path, "unexpected keys")


def test_an_adapter_in_the_bases_folder_is_not_applied(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    trainable, batch = _trainable(base), lay_out(_rows(base), share=False)
    before = trainable.label_losses(batch)
    change_adapter(trainable)
    trainable.save(base.folder)
    assert not torch.equal(trainable.label_losses(batch), before)
    assert torch.equal(_trainable(base).label_losses(batch), before)


# What is refused, and what transformers' modules are given


def test_what_a_base_or_a_machine_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="does not compute this base with attention: sdpa") as refused:
        _trainable(base_of_family(tmp_path, "mamba"), attention="sdpa", targets=("in_proj",))
    assert refused.value.where == "train.attention"

    def check(**settings: Any) -> None:
        check_weight_settings("phi3", WeightSettings.model_validate(settings), "candidates.a.train")

    with pytest.raises(Refused, match=r"pissa .* bf16 would round") as refused:
        check(start="pissa", precision="bf16")
    assert refused.value.where == "candidates.a.train.precision"
    monkeypatch.setattr(factory, "gpu_present", lambda: False)
    with pytest.raises(Refused, match="on a GPU and in bf16 only") as refused:
        check(attention="flash_attention_2")
    assert refused.value.where == "candidates.a.train.attention"
    monkeypatch.setattr(factory, "gpu_present", lambda: True)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="flash_attention_2 needs flash_attn"):
        check(attention="flash_attention_2")
    with pytest.raises(UsageError, match="kernels: liger needs liger_kernel"):
        check(kernels="liger")


def test_liger_patches_the_families_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its package, whose kernels need a GPU."""
    patched: list[tuple[str, dict[str, bool]]] = []
    stand_in = ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    stand_in._apply_liger_kernel_to_instance = lambda module, **how: patched.append(  # type: ignore[attr-defined]
        (module.config.model_type, how)
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    settings = model_settings(WeightSettings(kernels="liger"))
    assert HFModel(base_of_family(tmp_path, "llama"), settings).settings.liger
    assert patched == [("llama", {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(Refused, match="no kernels for the family 'gpt2'") as refused:
        HFModel(base_of_family(tmp_path, "gpt2"), settings)
    assert refused.value.where == "train.kernels"


# Bases in 4 bits


def test_four_bits_are_refused_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes restores rows that are not whole blocks wrongly on a CPU."""
    for family in ("llama", "gpt2"):
        with pytest.raises(Refused, match=r"has 32 inputs, and bitsandbytes .* multiples of 64"):
            _trainable(base_of_family(tmp_path, family), quantize="4bit")
    for other in ({"method": "full"}, {"start": "pissa"}, {"dora": True}):
        with pytest.raises(ValidationError, match=r"quantize: 4bit cannot be combined with .*leave one of the two out"):
            WeightSettings.model_validate({"quantize": "4bit", **other})
    monkeypatch.setattr("tunesmith.engines.hf.support.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as error:
        _trainable(base_of_family(tmp_path / "wide", "llama", sizes=WIDE), quantize="4bit")
    assert "tunesmith[qlora]" in str(error.value.fix)


def test_importing_bitsandbytes_downloads_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the package `kernels` for code from a hub, on processors with bf16; PEFT imports it."""
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    with libraries._without_downloads(), pytest.raises(ImportError):
        import_module("kernels")
    assert import_module("kernels") is sys.modules["kernels"]
    imported: list[str] = []
    monkeypatch.setattr(libraries, "bitsandbytes", lambda: imported.append("bitsandbytes"))
    libraries.peft.__wrapped__()
    assert imported == ["bitsandbytes"], "before PEFT does"
