"""Shapes of adapters, by arithmetic: what a plan counts and a checkpoint holds."""

from __future__ import annotations

from fsdp_qlora.shapes.linears import LinearShape


def lora_shapes(linear: LinearShape, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B; of stacked matrices, those of all."""
    return (linear.count * r, linear.in_features), (linear.out_features, linear.count * r)


def lora_parameters(linear: LinearShape, r: int) -> dict[str, tuple[int, int]]:
    """Return name in PEFT's file -> shape of A and B."""
    a, b = lora_shapes(linear, r)
    prefix = f"base_model.model.{linear.name}"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
