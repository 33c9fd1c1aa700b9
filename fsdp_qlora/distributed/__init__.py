"""Ranks, process groups, and how ranks wait for each other."""
