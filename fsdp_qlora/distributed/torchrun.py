"""torchrun's environment variables: only a complete set makes this process a rank.

Single variables are easily left over from another program or a shell's start-up file; trusting them would make a
process wait for ranks that nobody starts. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT")
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OPTIONAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MARK = "TORCHELASTIC_"
"""Prefix of further variables that torch's elastic agent sets for its workers."""


def is_rank(env: Mapping[str, str]) -> bool:
    """Whether ``env`` has a complete, valid set of torchrun's variables."""
    return not _missing(env)


def num_ranks_of(env: Mapping[str, str]) -> int:
    """Return the number of ranks that torchrun has started; 1 if this process is none of them."""
    return int(env["WORLD_SIZE"]) if is_rank(env) else 1


def leftovers(env: Mapping[str, str]) -> str:
    """Return a note if torchrun's variables are incomplete; an empty string if all or none are set."""
    present = [name for name in (*_REQUIRED, *_OPTIONAL) if name in env]
    if not present or is_rank(env):
        return ""
    shown = ", ".join(f"{name}={env[name]!r}" for name in present)
    return (
        f"{shown}: ignored, because {' and '.join(_missing(env))} {'is' if len(_missing(env)) == 1 else 'are'} missing "
        "or malformed. Start ranks with torchrun or launcher.nproc_per_node, or set all of torchrun's variables."
    )


def forget_leftovers(env: MutableMapping[str, str], ours: Iterable[str] = ()) -> str:
    """Remove an incomplete set, and the variables ``ours``, from ``env``; return the note from `leftovers`."""
    note = leftovers(env)
    if not is_rank(env):
        marked = [name for name in env if name.startswith(_MARK)]
        for name in (*_REQUIRED, *_OPTIONAL, *marked, *ours):
            env.pop(name, None)
    return note


def _missing(env: Mapping[str, str]) -> list[str]:
    bad = [name for name in _REQUIRED if not env.get(name)]
    bad += [name for name in _NUMBERS if name not in bad and not _is_number(env[name])]
    bad += [name for name in _OPTIONAL if name in env and not _is_number(env[name])]
    if not bad and int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        bad.append("a RANK below WORLD_SIZE")
    return bad


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
