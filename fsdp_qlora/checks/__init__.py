"""Checks that a run computes what the model's authors wrote."""
