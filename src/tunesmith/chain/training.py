"""A candidate's adapter: trained from the dataset version's rows as the candidate's prompt puts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.candidates.answering import Answerer, compose
from tunesmith.candidates.candidate import Candidate
from tunesmith.chain.walk import Chain
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Example
from tunesmith.data.signoff import require_signed
from tunesmith.project import Project
from tunesmith.training.rows import training_rows

if TYPE_CHECKING:
    from tunesmith.training.settings import TrainSettings


def train_candidate(
    chain: Chain, name: str, candidate: Candidate, settings: TrainSettings, *, restart: bool = False
) -> str:
    """Digest of the training of a candidate that has no adapter yet. Raises UsageError for one with shots."""
    if candidate.shots:
        raise UsageError(
            "a candidate with shots cannot be trained: some rows would hold their own answers",
            where=f"candidates.{name}",
            fix="remove shots or train; or name another's adapter with weights:",
        )
    if chain.project.settings.data.sign_off:
        require_signed(chain.store, chain.dataset.digest)
    looks_up = {key: getattr(candidate, key) for key in ("documents", "embedder") if getattr(candidate, key)}
    if candidate.retrieve is not None:
        looks_up["retrieve"] = candidate.retrieve.model_dump(mode="json", by_alias=True)
    inputs = {
        **looks_up,
        "base": chain.base.digest,
        "dataset": chain.dataset.digest,
        "prompt": candidate.prompt,
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
    }

    def fit(work: Path) -> str:
        from tunesmith.training.train import TrainingRow, train

        answerer = Answerer(chain.store, chain.engine, candidate)

        def rows(examples: Sequence[Example]) -> list[TrainingRow]:
            # Looked up without the row's own group, as it will be for requests of groups that were never seen.
            return [
                TrainingRow(each.id, compose(candidate, each.messages, answerer.without_group(each)))
                for each in examples
            ]

        return train(
            chain.store,
            base=chain.base,
            dataset=chain.dataset.digest,
            rows=rows(training_rows(chain.dataset.examples("train"), settings)),
            validation=rows(chain.dataset.examples("validation")),
            settings=settings,
            work=work / "checkpoints",
            restart=restart,
            progress=chain.progress,
        )

    return chain.stages.run(f"train {name}", "train", inputs, fit, again=restart)


def tuned_names(project: Project) -> list[str]:
    """The candidates that are trained for their own sake: controls are not among them."""
    candidates = project.settings.candidates.items()
    return [name for name, settings in candidates if settings.train and not settings.train.permute_answers]
