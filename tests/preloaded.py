"""What the processes of tests/forked.py need, imported once: that takes longer than most of what they do."""

from __future__ import annotations

import gc

import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Phi3ForCausalLM

from tunesmith import api
from tunesmith.cli import main
from tunesmith.engines.hf import libraries, loaded
from tunesmith.jobs import worker
from tunesmith.server import app
from tunesmith.training.launchers import together as training

libraries.transformers()
libraries.peft()
gc.freeze()  # a process that collects garbage would copy the memory of all that is loaded here

__all__ = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LoraConfig",
    "Phi3ForCausalLM",
    "api",
    "app",
    "get_peft_model",
    "loaded",
    "main",
    "pytest",
    "torch",
    "training",
    "worker",
]
