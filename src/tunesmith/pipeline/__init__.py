"""The stages in order: what is out of date, what is skipped, where a stopped stage resumes.

stages.py runs one stage; context.py holds what they share. Then, each calling only the ones before it: training.py,
training_search.py, candidates.py, answers.py and probes.py, verdicts.py, run.py.
"""

from tunesmith.pipeline.answers import plan
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext

__all__ = ["PipelineContext", "answerer", "candidate", "plan"]
