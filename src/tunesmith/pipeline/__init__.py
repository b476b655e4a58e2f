"""The stages in order: what is out of date, what is skipped, where a stopped stage resumes.

stages.py runs one stage; context.py holds what they share. Then, each calling only the ones before it: training.py,
training_search.py, candidates.py, answers.py and probes.py, verdicts.py, run.py.
"""
