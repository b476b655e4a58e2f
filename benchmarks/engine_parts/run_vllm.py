"""vLLM on given requests, by its own Python: python run_vllm.py TOLD.json, which prints what was found.

Imports nothing of this project. The engine is warm: it has answered other requests behind the same prompt, so the
prompt's keys are in its prefix cache when the time is taken.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Answer and print."""
    told = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=told["model"],
        dtype="bfloat16",
        enable_prefix_caching=True,
        max_num_seqs=told["batch"],
        max_model_len=1024,
        disable_log_stats=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=told["tokens"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in told["prompts"]]
    warm = [TokensPrompt(prompt_token_ids=ids) for ids in told["warm"]]
    engine.generate(warm, greedy, use_tqdm=False)
    began = time.perf_counter()
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - began
    made = sum(len(answer.outputs[0].token_ids) for answer in answers)
    print(json.dumps({"tokens_per_second": made / seconds, "tokens": made}), flush=True)


if __name__ == "__main__":
    main()
