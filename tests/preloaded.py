"""What the processes of tests/forked.py need, imported once: that takes longer than most of what they do."""

# ruff: noqa: F401
import gc

import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Phi3ForCausalLM

import tunesmith.api
import tunesmith.cli.main
import tunesmith.jobs.worker
import tunesmith.server.app
import tunesmith.training.launchers
from tunesmith.engines.hf import engine, libraries

libraries.transformers()
libraries.peft()
gc.freeze()  # a process that collects garbage would copy the memory of all that is loaded here
