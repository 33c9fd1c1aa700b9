"""Simulates a step: the real model code on fake tensors; every allocation is counted, nothing is allocated."""
