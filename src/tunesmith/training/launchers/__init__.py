"""Trainings on several ranks: on torchrun's, or on Ray's workers."""
