"""Whether an adapter belongs to the base that it is loaded onto.

The fingerprint in its file's header says so. Without one, what else its folder tells is compared: the linears that its
config means, its vocabulary, and the name of its base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists

from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    opened_weights,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.names import IN_FILE
from fsdp_qlora.adapters.spellings import in_model
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.load.fingerprint import Base, Facts, differences, formats_of, read_fingerprint
from fsdp_qlora.load.stored import packed_format

_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_ROWS = 4096
"""Rows of a table that are compared at a time."""
_TOKENIZER = "tokenizer.json"
_OTHER_TOKENS = 0.01
"""Share of token ids with other tokens up to which a vocabulary counts as the same, with tokens of its own."""


def require_base(folder: Path, base: Base, name: str) -> list[str]:
    """Check that an adapter folder's adapter is whole, and one for ``base``, which the user calls ``name``.

    Returns:
        What to say: that it was trained on the weights in another format, or what is not known without a fingerprint.

    Raises:
        ModelError: naming each field that shows another base, or the tensors that are missing or not meant.
    """
    if (facts := fingerprint_in(folder)) is not None:
        said = require_same_base(folder, base, facts)
        require_targets(folder, base)
        return [said] if said else []
    require_targets(folder, base)
    _require_vocabulary(folder, base.source.folder)
    there = read_adapter_config(folder).base_model
    if there is not None and _is_same(there, name):
        return []
    named = "does not name its base" if there is None else f"names {there} as its base"
    return [
        f"adapter: {folder} {named}, and its file holds no fingerprint of one. Its tensors fit {name}; whether it was "
        "trained on the same weights is not known"
    ]


def _is_same(one: str, two: str) -> bool:
    return one == two or Path(one).expanduser().resolve() == Path(two).expanduser().resolve()


def fingerprint_in(folder: Path) -> Facts | None:
    """Return the fingerprint of the base in the header of an adapter's file; None if there is none.

    Raises:
        ModelError: if it is malformed, or there is no file.
    """
    file = own_file(folder, WEIGHTS_NAME)
    try:
        with opened_weights(file) as stored:
            return read_fingerprint(stored.metadata())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ModelError(f"adapter: the fingerprint of the base in {file} is malformed: {error}.") from error


def require_same_base(folder: Path, base: Base, theirs: Facts) -> str | None:
    """Check that an adapter with the fingerprint ``theirs`` was trained on the weights of ``base``.

    Returns:
        What to say if the weights are the same and their format is another one; None: nothing.

    Raises:
        ModelError: if it was trained on other weights, naming each field that differs.
    """
    ours = base.fingerprint()
    if odd := list(differences(theirs, ours)):
        raise ModelError(
            f"adapter: {folder} was trained on another base than {base.source.folder}: {'; '.join(odd)}. Set "
            "model.name to the base that it was trained on."
        )
    there, here = formats_of(theirs), formats_of(ours)
    if there == here or not there:
        return None
    off = base.difference(theirs)
    far = "; by how much its weights differ is not known, as the files hold only their 4-bit form"
    if off is not None:
        far = f", whose weights differ by {off:.1e} of their size (root mean square of a sample)"
    return f"adapter: {folder} was trained on this base in {there}; here it is in {here}{far}"


def require_targets(folder: Path, base: Base) -> None:
    """Check that an adapter has tensors for the linears of ``base`` that its config means to PEFT, and for no others.

    PEFT would leave the ones without tensors as they are initialised, and pass over tensors that nothing means. A
    config that does not say what it means (no ``target_modules``, or ``all-linear``) is not checked. Copies of the
    base's own tables in the file, which PEFT would put in their places, must be those of ``base``.

    Raises:
        ModelError: naming the first linear that is missing, or not meant, or a table of another base.
    """
    _require_tables(folder, base)
    values, shapes = read_json(own_file(folder, CONFIG_NAME), dict[str, Any]), base.shapes
    if not values.get("target_modules") or str(values["target_modules"]).lower() == "all-linear":
        return
    chosen = SimpleNamespace(**{key: values.get(key) for key in _SELECTING})
    modules = {x.name for x in shapes.linears if not x.stacked} - shapes.not_adapted | {shapes.embedding, shapes.head}
    try:
        meant = {x for x in modules if check_target_module_exists(chosen, x)}
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"adapter: {folder / CONFIG_NAME} is malformed: it selects modules by {error}.") from error
    config, file = read_adapter_config(folder), folder / WEIGHTS_NAME
    meant -= set(config.modules)  # PEFT trains these whole instead
    keys = {IN_FILE + x for x in modules}
    names = (x for x in stored_modules(folder, config) if not config.stacked_in(x))
    stored = {in_model(IN_FILE + x, keys).removeprefix(IN_FILE) if x not in modules else x for x in names}
    if missing := sorted(meant - stored):
        raise ModelError(
            f"adapter: {file} has no tensors for {len(missing)} of the {len(meant)} modules that target_modules in "
            f"{CONFIG_NAME} means (first: {missing[0]}): the file is not whole, or its config of another adapter."
        )
    if unused := sorted(stored & modules - meant):
        raise ModelError(
            f"adapter: {file} has tensors for {len(unused)} modules that target_modules in {CONFIG_NAME} does not mean "
            f"(first: {unused[0]}): PEFT would pass over them. The file or its config is of another adapter."
        )


def _require_tables(folder: Path, base: Base) -> None:
    file, shapes = own_file(folder, WEIGHTS_NAME), base.shapes
    with opened_weights(file) as stored:
        for name in stored.tables:
            module = name.removeprefix(IN_FILE).partition(".base_layer.")[0]
            table = shapes.embedding if shapes.tied and module == shapes.head else module
            parameter = f"{table}.weight"
            if parameter not in shapes.parameters or packed_format(base.source, parameter) is not None:
                continue  # of no table here: that its adapter fits nothing is said where it is loaded
            theirs, ours = stored.get_slice(name), shapes.parameters[parameter]
            if tuple(theirs.get_shape()) != ours or not _is_equal(theirs, base, parameter):
                raise ModelError(
                    f"adapter: {file} holds a whole {module}, {theirs.get_shape()}, beside the adapter on it, and it "
                    f"is not that of {base.source.folder} ({list(ours)}): it was trained on another base, or on one "
                    "whose vocabulary was resized. Set model.name to the base that it was trained on."
                )


def _is_equal(theirs: Any, base: Base, parameter: str) -> bool:
    """Whether a table in an adapter's file is the base's, rounded to the file's dtype; read some rows at a time."""
    rows, columns = base.shapes.parameters[parameter]
    stored = base.source.find(parameter, (rows, columns))
    for start in range(0, rows, _ROWS):
        part = theirs[start : start + _ROWS]
        ours = base.source.read(stored, start * columns, start * columns + part.numel()).view_as(part)
        if not torch.equal(ours.to(part.dtype), part):
            return False
    return True


def _require_vocabulary(folder: Path, base: Path) -> None:
    """Check that the tokenizer beside an adapter gives ids the tokens that the base's does; with spare and new ones."""
    theirs, ours = _tokens(folder), _tokens(base)
    both = sorted(theirs.keys() & ours.keys())
    odd = [number for number in both if theirs[number] != ours[number]]
    if len(odd) > _OTHER_TOKENS * len(both):
        first = odd[0]
        raise ModelError(
            f"adapter: {folder} was trained with another vocabulary than {base}: {len(odd)} of {len(both)} ids are "
            f"other tokens (first: {first} is {theirs[first]!r}, but {ours[first]!r} here), of {len(theirs)} and "
            f"{len(ours)}. Set model.name to the base that it was trained on."
        )


def _tokens(folder: Path) -> Mapping[int, str]:
    """Return the tokens of a folder's tokenizer.json by id; none, if there is no such file or it has another form."""
    if not (folder / _TOKENIZER).is_file():
        return {}
    try:
        tokens = read_json(own_file(folder, _TOKENIZER), dict[str, Any])
    except (OSError, ValueError):  # it is said where the tokenizer is loaded
        return {}
    model = tokens.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        by_id = {number: token for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        by_id = {n: str(pair[0]) for n, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    else:
        return {}
    added = tokens.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            by_id[token["id"]] = str(token.get("content"))
    return by_id
