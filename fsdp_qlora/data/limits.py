"""Checks before training that rows fit the model's embedding and positions; a step would raise an index error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_rows_fit(
    data: PreparedData, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, num_rows: int, positions: int | None
) -> None:
    """Check the token ids of all rows against the model's embedding, and their lengths against its positions.

    Args:
        data: the tokenized rows.
        settings: how the rows are laid out.
        tokenizer: the tokenizer that made them.
        num_rows: number of rows in the model's embedding.
        positions: longest row that the model supports; None if there is no limit.

    Raises:
        DataError: if they do not fit, naming both sizes and a remedy.
    """
    more_tokens = has_more_tokens(tokenizer, num_rows)
    ends = positions is not None and settings.max_length > positions
    if not more_tokens and not ends:  # the usual case: no rows are read
        return
    parts = [TokenRows(part) for part in (data.train, data.eval) if part is not None]
    if more_tokens:
        for rows in parts:
            require_known(rows.largest_token(), tokenizer, num_rows)
    longest = settings.max_length if data.stream is not None else max(int(rows.lengths.max()) for rows in parts)
    if positions is not None and longest > positions:
        raise DataError(
            f"data.max_length: rows have up to {longest} tokens, but this model has only {positions} learned "
            f"positions. Set data.max_length={positions} or less."
        )


def has_more_tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> bool:
    """Return whether a tokenizer may produce ids that have no row in the embedding."""
    return max(tokenizer.get_vocab().values(), default=0) >= num_rows


def require_known(token: int, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Check that ``token``, the largest id of some rows, has a row in the embedding.

    Raises:
        DataError: if it does not, naming the token.
    """
    if token >= num_rows:
        text = tokenizer.convert_ids_to_tokens(token)
        raise DataError(
            f"data: the rows hold token {token} ({text!r}), but the model's embedding has only {num_rows} rows. "
            "Tokenizer and model do not match: use the tokenizer that came with the model, or a model whose embedding "
            "was resized."
        )


def tokens_known(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Callable[[TokenRows], TokenRows]:
    """Return a function that checks the tokens of a streamed global batch, unknown until then, and returns its rows.

    Every rank tokenizes the whole batch of a stream, so all ranks raise the same error.
    """
    if not has_more_tokens(tokenizer, num_rows):
        return lambda rows: rows

    def compared(rows: TokenRows) -> TokenRows:
        require_known(rows.largest_token(), tokenizer, num_rows)
        return rows

    return compared
