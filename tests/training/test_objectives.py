"""A supervised objective gives its weights up front; one over pairs of rows, by both engines, compared with torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tests.hf_models import base_of_family
from tests.tiny import row
from tests.trained import fit, saved
from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch, empty_batch, label_count, lay_out
from tunesmith.engines.factory import load_model
from tunesmith.engines.native import engine as native_engine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.objectives import CrossEntropy, Objective
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, update

# Of each pair the first answer is preferred.
PAIRS = [row(f"is light {n} on?", answer) for n in range(3) for answer in (f'{{"on":{n}}}', f"It is {n}, I think.")]
ADAPTER, FULL = {"rank": 4, "learning_rate": 0.02}, {"method": "full", "learning_rate": 0.003}


class Preference(Objective):
    """Rafailov et al. 2023: a batch's rows are pairs, and the model is to raise the first against the second."""

    uses_reference = True

    def loss(self, batch: Batch, log_probabilities: Tensor, reference: Tensor | None, divisor: float) -> Tensor:
        assert reference is not None
        gained = log_probabilities - reference
        rows = gained.new_zeros(len(batch.lengths)).index_add(0, batch.label_rows, gained)
        return -logsigmoid(rows[::2] - rows[1::2]).sum() / divisor


@pytest.mark.parametrize(
    ("engine", "settings"),
    [("native", ADAPTER), ("hf", ADAPTER), ("hf", {**ADAPTER, "recompute": True}), ("native", FULL)],
    ids=str,
)
def test_a_preference_learns_as_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(native_engine, "load_network", lambda folder: load_network(folder, torch.float32))
    base, chosen = base_of_family(tmp_path, "llama"), TrainSettings(schedule="constant", weight_decay=0.0, **settings)
    ours, renderer = load_model(base, engine).trainable(chosen, seed=0, state_bytes=16), Renderer(base.folder)
    plain, reference = (AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval() for _ in "ab")
    plain.get_input_embeddings().padding_idx = None  # or its gradient leaves the end token out
    theirs: Any = plain
    if "rank" in settings:
        theirs = PeftModel.from_pretrained(plain, str(saved(ours, tmp_path / "start")), is_trainable=True).eval()

    def gained(row: Rendered) -> Tensor:
        """By how much a row's labels are likelier than by the base."""
        ids, trained = torch.tensor(row.ids), torch.tensor(row.trained)
        one, other = (model(ids[None]).logits[0, :-1].log_softmax(-1) for model in (theirs, reference))
        return (one - other.detach()).gather(1, ids[1:, None])[trained[1:], 0].sum()

    rows = [renderer.conversation(each) for each in PAIRS]
    step = [*(lay_out(part, share=ours.shares_prefix) for part in (rows[:4], rows[4:])), empty_batch()]
    one = make_optimizer(ours, chosen)
    two = torch.optim.AdamW(theirs.parameters(), chosen.learning_rate, weight_decay=0.0)
    for _ in range(3):
        each = torch.stack([gained(row) for row in rows])
        expected = -logsigmoid(each[::2] - each[1::2]).sum() / sum(map(label_count, rows))
        expected.backward()
        assert gradients(ours, Preference(), step) == pytest.approx(float(expected.detach()), rel=1e-4)
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in theirs.parameters() if tensor.grad is not None])
        assert update(ours, one, chosen.learning_rate, clip=1e9) == pytest.approx(float(norm), rel=2e-3)
        two.step()
        two.zero_grad()
    state = fit(ours, [step] * 9, [], chosen, tmp_path / "work", objective=Preference())
    assert state.curve[-1]["loss"] < 0.7 * float(expected.detach())
    if engine == "hf":
        for changing in (FULL, {**ADAPTER, "start": "pissa"}):
            ours = load_model(base, engine).trainable(TrainSettings(**changing), seed=0, state_bytes=16)
            with pytest.raises(Refused, match="compares with the base, whose weights this training changes"):
                gradients(ours, Preference(), step)


@pytest.mark.parametrize("labels", [1, 3, 49, 9_973, 1_000_003])
def test_a_supervised_training_weighs_its_labels_alike_without_a_pass(labels: int) -> None:
    _, weights = CrossEntropy().weigh(empty_batch(), torch.zeros(labels), None, float(labels))
    assert CrossEntropy.linear
    assert torch.equal(weights, torch.full((labels,), 1.0 / labels))
