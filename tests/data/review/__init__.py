"""Tests of the review queue and of builds that read its decisions."""
