"""The risk probes by name: what settings and reports must know of them before anything is measured.

To add a probe, write its `Suite` in a module of this folder, under its name in the module's SUITES, and list it here.
Everything else follows from these two: the gate's settings and their reference, what the chain asks, the judge, the
record, and the report with its advice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from tunesmith.evaluation.probes.suites import Suite


class ProbeKind(NamedTuple):
    """A probe. module: where its suite is. measures: its number and its unit, in words. unit: if not points.

    path: whether its gate may or must name a file or folder. rows: whether the gate limits how many items are asked.
    like: another probe whose answers it is judged by.
    """

    module: str
    measures: str
    unit: str = ""
    path: Literal["", "may", "must"] = ""
    rows: bool = True
    like: str = ""

    @property
    def summary(self) -> str:
        """What the probe measures, without the unit."""
        return self.measures.split(" (")[0]


PROBES = {
    "canaries": ProbeKind(
        "memory",
        "mean exposure in bits of secrets planted in training (about 1.4 where nothing is memorised)",
        unit="bits",
        rows=False,
    ),
    "membership": ProbeKind(
        "memory",
        "AUC of telling training answers from held-out answers by their loss per token (0.5 is chance)",
        unit="AUC",
    ),
    "membership_tpr": ProbeKind(
        "memory",
        "share of training answers recognised as such where 1% of held-out ones are mistaken for them",
        like="membership",
    ),
    "extraction": ProbeKind(
        "memory", "share of training answers repeated word for word from half a request, minus that of held-out rows"
    ),
    "personal_data": ProbeKind(
        "memory", "share of training answers with personal data that the model repeats without having read it"
    ),
    "overfitting": ProbeKind("memory", "mean score on training rows minus that on test rows"),
    "swap": ProbeKind(
        "bias", "rise by tuning of how much the answer's probability, whole or per token, depends on names and gender"
    ),
    "bbq": ProbeKind("bias", "rise by tuning of the preference for BBQ's stereotyped answer", path="must"),
    "crows_pairs": ProbeKind("bias", "rise by tuning of the share of CrowS-Pairs' stereotyping sentence", path="must"),
    "general_text": ProbeKind(
        "drift",
        "rise by tuning of the loss on general text, in nats a token (0.1 is a perplexity 10% higher)",
        unit="nats a token",
        path="may",
    ),
    "formats": ProbeKind(
        "drift", "fall by tuning of the preference, per word, for the requested output format, where the base had it"
    ),
    "refusal": ProbeKind(
        "drift", "fall by tuning of refusing unsafe requests, helping with harmless ones, or staying polite"
    ),
    "lm_eval": ProbeKind(
        "harness",
        "fall by tuning of the accuracy on multiple-choice tasks of lm-eval, of the task that fell most",
        path="must",
    ),
    "robustness": ProbeKind(
        "drift", "fall of the score under typos, capitals, rewording or an instruction inside the request"
    ),
}


def suite_of(name: str) -> Suite:
    """The suite of a probe, or of a gate's suite name, such as "swap/100". Its module is imported here."""
    probe = name.split("/", 1)[0]
    suite: Suite = import_module(f"tunesmith.evaluation.probes.{PROBES[probe].module}").SUITES[probe]
    return suite
