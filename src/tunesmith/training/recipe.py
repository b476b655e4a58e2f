"""The settings that fit a training's rows and base, where the project leaves them open."""

from __future__ import annotations

from tunesmith.training.settings import TrainSettings

# Measured on a base of width 576 (`python benchmarks/study.py --table`): with four times the rate for B, which starts
# at zero (LoRA+), 1,000 rows of slots give 7 points more.
_B_RATE = 4.0
_WIDEST = 1024  # wider bases want lower rates, and were not measured
# The same table: one epoch leaves most of 200 rows unlearned, and ten learn them. On 1,000 rows three do.
_READ = 3000  # rows to read in all
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 10


def fit_to_rows(settings: TrainSettings, rows: int, width: int | None) -> TrainSettings:
    """The settings with the epochs for so many rows and the rate of B for the base, where they state none.

    Without a budget, rows are read three times, and fewer than 1,000 more often, up to ten times. B has four times the
    rate. Where `learning_rate` or `b_rate` is stated, both are as stated or as their defaults, and so they are for
    adapters that were not measured: PiSSA, rsLoRA, DoRA. Canaries are among the rows but do not count: a training with
    them shows what the training without them memorises. width: of the base's hidden states, None where it is not known.
    """
    if settings.canaries:
        rows -= settings.canaries.added
    if settings.budget is None and "epochs" not in settings.model_fields_set:
        epochs = round(min(_MOST_EPOCHS, max(_LEAST_EPOCHS, _READ / rows)))
        settings = settings.model_copy(update={"epochs": epochs})
    stated = settings.model_fields_set & {"learning_rate", "b_rate"}
    plain = settings.method == "lora" and (settings.start, settings.scaling, settings.dora) == ("zero", "rank", False)
    if stated or not plain or width is None or width > _WIDEST:
        return settings
    return settings.model_copy(update={"b_rate": _B_RATE})
