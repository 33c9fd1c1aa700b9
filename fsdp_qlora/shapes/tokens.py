"""Names and shapes of the rows that added tokens get in embedding and head (``model.add_tokens``)."""

from __future__ import annotations

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name for trained rows of a table, below the table's own name."""


def tables_of_tokens(shapes: ModelShapes) -> tuple[str, ...]:
    """Return the modules that get a row for each added token: the embedding, and the head unless it is tied."""
    return (shapes.embedding,) if shapes.tied else (shapes.embedding, shapes.head)


def token_rows(shapes: ModelShapes, count: int) -> dict[str, tuple[int, int]]:
    """Return name in PEFT's file -> shape of the rows of ``count`` added tokens.

    Raises:
        PlanError: if the model cannot get any.
    """
    if not count:
        return {}
    if not shapes.edges_apart:
        raise PlanError("model.add_tokens: only causal language models can get new tokens; leave it out.")
    if f"{shapes.head}.bias" in shapes.parameters:
        raise PlanError(
            f"model.add_tokens: the head of this model ({shapes.head}) has a bias, which plain PEFT drops where it "
            "trains rows of a head, so the adapter would compute something else there; leave it out."
        )
    size = (count, shapes.hidden_size)
    return {f"base_model.model.{table}.{TOKEN_ROWS}": size for table in tables_of_tokens(shapes)}


def trained_indices(shapes: ModelShapes, first: int, count: int) -> dict[str, list[int]]:
    """Return PEFT's ``trainable_token_indices`` for tokens from ``first`` on; PEFT ties a tied head by itself."""
    return {table: list(range(first, first + count)) for table in tables_of_tokens(shapes)}
