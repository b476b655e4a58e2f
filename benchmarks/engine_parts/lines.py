"""What contenders found, as printed rows and as lines of the table of goals."""

from __future__ import annotations

from collections.abc import Sequence

from engine_parts.environments import INSTALL, Peer
from engine_parts.processes import Contender, Failed, Figures, in_turn, installed
from engine_parts.report import Line
from engine_parts.training import RANK

NO_TRL = "TRL is not installed (pip install --group bench)"


def trainings(title: str, contenders: Sequence[Contender], rounds: int) -> dict[str, Figures]:
    """Medians of contenders in turn, printed. Raises Failed where we are not among them."""
    found = in_turn(contenders, rounds)
    if "tunesmith" not in found:
        raise Failed("nothing to compare with")
    print(f"\n{title}, rank {RANK} where it is an adapter, every linear layer, bf16")
    print(f"{'':<44}{'examples/s':>12}{'peak GB':>10}{'loss first':>12}{'last':>8}")
    for name, figures in found.items():
        print(
            f"{name:<44}{figures['examples_per_second']:>12.2f}{figures['peak_gb']:>10.2f}{figures['first']:>12.3f}"
            f"{figures['last']:>8.3f}",
            flush=True,
        )
    return found


def speed_line(
    what: str,
    found: dict[str, Figures],
    name: str,
    label: str,
    goal: float | None,
    key: str = "examples_per_second",
) -> Line:
    """Our speed, by a key of figures, beside that of a contender, who is called label."""
    if name not in found:
        return Line(what, lacks=NO_TRL if not installed("trl") and name.startswith("trl") else f"{name} failed")
    ours, peer = found["tunesmith"][key], found[name][key]
    return Line(what, f"{ours:.1f}", label, f"{peer:.1f}", ours / peer, goal)


def memory_line(what: str, found: dict[str, Figures], name: str, label: str, goal: float) -> Line:
    """Our peak memory beside that of a contender, who is called label."""
    if name not in found:
        return Line(what, lacks=NO_TRL if not installed("trl") and name.startswith("trl") else f"{name} failed")
    ours, peer = found["tunesmith"]["peak_gb"], found[name]["peak_gb"]
    return Line(what, f"{ours:.2f}", label, f"{peer:.2f}", ours / peer, goal, most=True)


def named(peer: Peer) -> str:
    """A peer with its version."""
    return peer.requirement.replace("==", " ")


def absent(peer: Peer) -> str:
    """That it is not there, and how it comes."""
    return f"{named(peer)} is not installed ({INSTALL})"
