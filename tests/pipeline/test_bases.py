"""A project whose candidates answer with two bases: rendered, trained, probed, served and recalled by their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call
from tests.tiny import SIZES, write_model
from tests.tiny_project import settings, write_project
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.access import ANYONE
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.lines import read_answer_lines
from tunesmith.evaluation.report.data import report_data
from tunesmith.models.base import open_base
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.pipeline.candidates import load_adapter
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.run import run
from tunesmith.pipeline.verdicts import verdict
from tunesmith.project import Project, parse_settings
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.versions import resolve
from tunesmith.server.answering.routing import ReadyVersions

TRAIN = {"epochs": 1, "rank": 2, "batch": 8}
PLAIN: dict[str, Any] = {"prompt": "prompt.txt", "max_tokens": 8}
TUNED = {**PLAIN, "train": TRAIN}
CANDIDATES = {
    "plain": PLAIN,
    "tuned": TUNED,
    "other": {**PLAIN, "base": "other"},
    "other-tuned": {**TUNED, "base": "other"},
    "other-again": {**PLAIN, "base": "other", "weights": "other-tuned"},
}
GATES = {"valid": {"metric": "json_valid", "at_least": 0.0}, "forgets": {"suite": "general", "drop_at_most": 1.0}}


def write_other(folder: Path) -> Path:
    """A smaller base of another family, whose template marks turns by other tokens."""
    write_model(folder, "qwen2", seed=3, sizes={**SIZES, "num_hidden_layers": 2})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|im_start|>", "<turn>").replace("<|im_end|>", "</turn>"))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that released a candidate of its second base as v1, and one of its first as v2."""
    folder = tmp_path_factory.mktemp("bases") / "p"
    write_other(folder / "other")
    write_project(folder, candidates=CANDIDATES, gates=GATES, release="other-tuned")
    project = Project.load(folder)
    done = run(project)
    assert done.registered is not None
    # Each base is loaded, and each stage runs, once.
    assert [stage.name for stage in done.stages[:3]] == ["base", "base other", "data"]
    assert len({stage.name for stage in done.stages}) == len(done.stages)
    judged = verdict(PipelineContext(project), "tuned")
    register(project.store, name="tiny", verdict=judged, actor=project.actor())
    return project


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    """A copy of it to change."""
    shutil.copytree(made.root, tmp_path / "p")
    return Project.load(tmp_path / "p")


def _candidates(project: Project) -> dict[str, Candidate]:
    stated = project.store.record(resolve(project.store, "tiny@v1").evaluation, kind="evaluation").body["candidates"]
    return {name: load_candidate(project.store, one["candidate"]) for name, one in stated.items()}


def test_each_candidate_is_rendered_trained_and_probed_on_its_own_base(made: Project) -> None:
    store, candidates = made.store, _candidates(made)
    evaluation = store.record(resolve(store, "tiny@v1").evaluation, kind="evaluation")
    own, other = candidates["plain"].base, candidates["other"].base
    assert own != other
    of = {name: candidate.base for name, candidate in candidates.items()}
    assert of == {name: other if "base" in stated else own for name, stated in CANDIDATES.items()}
    assert candidates["other-again"].training == candidates["other-tuned"].training
    for name in ("tuned", "other-tuned"):
        training = store.record(str(candidates[name].training))
        assert training.parents["base"] == of[name]
        assert training.body["fingerprint"] == open_base(store, of[name]).fingerprint
    probes = {role: digest for role, digest in evaluation.parents.items() if role.startswith("probe:")}
    bare = {"probe:base": own, "probe:base of other-again": other, "probe:base of other-tuned": other}
    assert probes.keys() == {*bare, *(f"probe:{name}" for name in ("tuned", "other-tuned", "other-again"))}
    for role, digest in probes.items():
        parents = store.record(digest).parents
        assert parents["base"] == (bare.get(role) or of[role.removeprefix("probe:")])
        assert ("training" in parents) is (role not in bare)
    suite = evaluation.body["probes"]["general"]
    for name in ("tuned", "other-tuned", "other-again"):
        before = suite["scores"]["base" if name == "tuned" else f"base of {name}"]["mean"]
        lost = before - suite["scores"][name]["mean"]  # of rounded means
        assert suite["drops"][name]["mean"] == pytest.approx(lost, abs=1e-8)
    assert suite["scores"]["base"] != suite["scores"]["base of other-tuned"]
    one = report_data(store, evaluation.digest, verdict=resolve(store, "tiny@v1").verdict)
    assert one.forgetting is not None
    assert one.forgetting.before.mean == suite["scores"]["base of other-tuned"]["mean"]


def test_the_report_names_the_smallest_base_that_is_not_worse(made: Project) -> None:
    evidence = report_data(made.store, resolve(made.store, "tiny@v1").evaluation)
    assert evidence.bases is not None
    small, large = evidence.bases.bases
    assert (small.base, large.base) == ("other", "model")
    assert 0 < small.size < large.size
    assert small.memory is not None
    assert small.per_second > 0
    # Random weights are right about nothing, so both are equal.
    assert evidence.bases.smallest == small.digest
    assert "other is the smallest base whose best candidate is not worse" in evidence.bases.sentence
    assert "above −2.0 points" in evidence.bases.sentence
    for form in ("html", "md"):
        call(made.root, "report", "tiny@v1", "--output", str(made.root / f"r.{form}"))
        assert "smallest base" in (made.root / f"r.{form}").read_text()


def test_versions_of_both_bases_are_verified_and_answer_as_measured(made: Project) -> None:
    context, store = PipelineContext(made), made.store
    ready = ReadyVersions(store, *(each.engine for each in context.bases))
    for label in ("tiny@v1", "tiny@v2"):
        assert call(made.root, "verify", label)["ok"]
        assert call(made.root, "chat", label, "-m", "turn on hall fan")["candidate"]
        version = resolve(store, label)
        answerer = ready.answerer(version)
        name, evaluation = answerer.candidate.name, store.record(version.evaluation)
        rows = load_dataset(store, evaluation.parents["dataset"]).examples("test")[:8]
        given = store.record(evaluation.parents[f"answers:{name}"])
        measured = read_answer_lines(store, given, [row["id"] for row in _lines(made, given)], name)
        asked = [answerer.generation(row.request, ANYONE) for row in rows]
        served = answerer.responder.generate(asked, answerer.candidate.training)
        assert [each.text for each in served] == [measured[row.id]["text"] for row in rows]


def _lines(project: Project, record: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in project.store.read_blob(record.blobs["answers.jsonl"]).splitlines()]


def test_a_recall_of_one_base_leaves_the_versions_of_the_other(project: Project) -> None:
    store = project.store
    of_other, of_own = resolve(store, "tiny@v1"), resolve(store, "tiny@v2")
    base = load_candidate(store, of_other.candidate).base
    recall(store, Cause(kind="base", value=base), reason="its licence ended", actor=project.actor())
    with pytest.raises(Refused, match="its licence ended"), verified_copy(store, of_other):
        pass
    with verified_copy(store, of_own):
        pass
    with pytest.raises(Refused, match="the base other was recalled"):
        run(project)
    kept = {name: each for name, each in CANDIDATES.items() if "base" not in each}
    write_project(project.root, candidates=kept, gates=GATES)
    done = run(Project.load(project.root))
    assert next(stage for stage in done.stages if stage.name == "train tuned").skipped, "its rows are the same"
    (project.root / "other" / "config.json").unlink()  # and nobody needs its files
    write_model(project.root / "model", seed=7)
    context = PipelineContext(Project.load(project.root))
    with pytest.raises(Refused, match=r"made on the base .*, which is none of the project's: model"):
        load_adapter(context, load_candidate(store, of_own.candidate).training)


def test_bases_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    other = {"base": "other"}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"a": {**PLAIN, **other}}, {}, "base: no candidate uses model"),
        ({"a": {**PLAIN, **other}, "near": {"method": "nearest"}}, {}, "no candidate uses model"),
        (
            {"a": TUNED, "b": {**PLAIN, **other, "weights": "a"}},
            {},
            r"trained on model, and 'b' answers with other: write",
        ),
        ({"a": {**PLAIN, "method": "nearest", **other}}, {}, "uses no language model: remove base"),
        (
            {"a": PLAIN, "b": {**PLAIN, **other}},
            {"engine": {"kind": "vllm", "url": "http://127.0.0.1:9"}},
            "b.base: engine runs one base only",
        ),
    ]
    for candidates, changes, said in cases:
        text = yaml.safe_dump({**settings(), "gates": {}, "candidates": candidates, **changes})
        with pytest.raises(UsageError, match=said):
            parse_settings(text, "x")
    write_other(tmp_path / "p" / "other")
    both = {"a": {**PLAIN, "base": "model"}, "b": {**PLAIN, **other}}
    folder = write_project(tmp_path / "p", candidates=both, gates={})
    with (folder / "rows.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "turn </turn> on"}, {"role": "assistant", "content": "{}"}]
        file.write(json.dumps({"messages": turns, "template": "x"}) + "\n")
    with pytest.raises(Refused, match=r"a control token of .*\(</turn> of other\)"):
        _ = PipelineContext(Project.load(folder)).dataset
