"""Whether an adapter was trained on the base that it is loaded onto, by the fingerprint in its file's header."""

from __future__ import annotations

from pathlib import Path

from fsdp_qlora.adapters.folder import WEIGHTS_NAME, opened_weights
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.load.fingerprint import Base, differences, formats_of, read_fingerprint


def require_same_base(folder: Path, base: Base) -> str | None:
    """Check that an adapter folder's adapter was trained on the weights of ``base``; one without a fingerprint passes.

    Returns:
        What to say if the weights are the same and their format is another one; None: nothing.

    Raises:
        ModelError: if it was trained on other weights, naming each field that differs, or the fingerprint is malformed.
    """
    file = own_file(folder, WEIGHTS_NAME)
    try:
        with opened_weights(file) as stored:
            theirs = read_fingerprint(stored.metadata())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ModelError(f"adapter: the fingerprint of the base in {file} is malformed: {error}.") from error
    if theirs is None:
        return None
    ours = base.fingerprint()
    if odd := list(differences(theirs, ours)):
        raise ModelError(
            f"adapter: {folder} was trained on another base than {base.source.folder}: {'; '.join(odd)}. Set "
            "model.name to the base that it was trained on."
        )
    there, here = formats_of(theirs), formats_of(ours)
    if there == here:
        return None
    off = base.difference(theirs)
    far = "; by how much its weights differ is not known, as the files hold only their 4-bit form"
    if off is not None:
        far = f", whose weights differ by {off:.1e} of their size (root mean square of a sample)"
    return f"adapter: {folder} was trained on this base in {there}; here it is in {here}{far}"
