"""Whether llama.cpp answers an export to Ollama as the version is served: tokens of prompts, and greedy answers.

    python benchmarks/ollama.py PROJECT VERSION FOLDER [--requests 50]

FOLDER was written by `tunesmith export VERSION FOLDER --form ollama`. llama.cpp is the wheel xllamacpp, asked as Ollama
asks it: with the Modelfile's template, stop tokens and limits. Both answer freely, then held to the version's schema,
which a client of Ollama gives as `format`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import xllamacpp

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.ollama_reader import read_modelfile, render

from tunesmith.api import Project
from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.composing import compose
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.data.dataset import load_dataset
from tunesmith.engines.factory import open_engine
from tunesmith.engines.protocol import Generation
from tunesmith.models.base import open_base
from tunesmith.models.rendering import Renderer
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.versions import resolve


def main() -> None:
    """Print how many prompts and answers are equal, and the answers that are not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=50)
    asked = parser.parse_args()
    project = Project.load(asked.project)
    version = resolve(project.store, asked.version)
    candidate = load_candidate(project.store, version.candidate)
    base = open_base(project.store, candidate.base)
    requests = [
        row.request for row in load_dataset(project.store, candidate.dataset).examples("test")[: asked.requests]
    ]
    composed = [compose(candidate, request) for request in requests]
    engine = open_engine(base, project.settings.engine)
    with verified_copy(project.store, version) as loaded:
        engine.load_adapter("a", loaded.adapter)

    lines = read_modelfile((asked.folder / "Modelfile").read_text())
    said, stops = dict(lines), [text for name, text in lines if name == "stop"]
    limits = {name: float(text) for name, text in lines if name in ("temperature", "repeat_penalty")}
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx = str((asked.folder / said["FROM"]).resolve()), int(said["num_ctx"])
    settings.warmup, settings.n_parallel, settings.use_jinja, settings.chat_template = False, 1, False, "chatml"
    settings.verbosity, settings.cpuparams.n_threads, settings.cpuparams_batch.n_threads = 0, 1, 1
    server, renderer = xllamacpp.Server(settings), Renderer(base.folder)

    def post(path: str, **body: object) -> Any:
        return httpx.post(server.listening_address + path, json=body, timeout=300).json()

    prompts = [render(said["TEMPLATE"], request) for request in requests]
    tokens = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in prompts]
    equal = sum(ids == renderer.prompt(each) for ids, each in zip(tokens, composed, strict=True))
    print(f"prompts with the same tokens: {equal} of {len(requests)}")
    schema = candidate.answer_schema
    rule = Constraint(candidate)
    for held in (False, True) if schema else (False,):
        extra = {"json_schema": json.loads(schema)} if held else {}
        answers = [
            post("/completion", prompt=text, n_predict=int(said["num_predict"]), stop=stops, **limits, **extra)[
                "content"
            ]
            for text in prompts
        ]
        free = [Generation(each, max_tokens=candidate.max_tokens) for each in composed]
        each_held = [rule.hold(each, request) for each, request in zip(free, requests, strict=True)]
        ours = engine.generate(each_held if held else free, "a")
        same = sum(theirs == mine.text for theirs, mine in zip(answers, ours, strict=True))
        print(f"{'held to the schema' if held else 'free'}: {same} of {len(ours)} answers equal")
        for theirs, mine in zip(answers, ours, strict=True):
            if theirs != mine.text:
                print(f"  llama.cpp {theirs!r}\n  ours      {mine.text!r}")


if __name__ == "__main__":
    main()
