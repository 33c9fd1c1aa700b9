"""Uploads an export to the hub in one commit, and reads back what the hub then has.

The token comes from the hub library's own login (``hf auth login``, ``HF_TOKEN``); no setting of ours holds it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fsdp_qlora.errors import ConfigError, StorageError, typed_line
from fsdp_qlora.files.read import file_sha256

_ATTRIBUTES = ".gitattributes"
_DENIED = (401, 403)


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Turn the hub's errors into ours, in one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError("export.push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.") from error
    except HfHubHTTPError as error:
        said = f"export.push: {constants.ENDPOINT} refused {doing}: {typed_line(error)}"
        if error.response.status_code in _DENIED:
            raise ConfigError(f"{said} Log in as someone who may do it (`hf auth login`).") from error
        raise StorageError(said) from error
    except Exception as error:  # no connection, a card it refuses, hf_xet: in terms of whichever library it uses
        raise StorageError(f"export.push: {doing} failed at {constants.ENDPOINT}: {typed_line(error)}") from error


def require_login(repo: str, overwrite: bool) -> None:
    """Check, before any work, that the logged-in user can push to a repository, as far as the hub says so.

    Raises:
        ConfigError: if nobody is logged in, the token or the name will not do, or the repository has files and
            ``overwrite`` is false.
        StorageError: if the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"export.push: {error}") from error
    if get_token() is None:
        raise ConfigError("export.push: nobody is logged in to the hub. Log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    with _errors("the login"):
        user = api.whoami()
    owner, role = repo.partition("/")[0], (user.get("auth") or {}).get("accessToken", {}).get("role")
    names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in names:
        raise ConfigError(f"export.push: {repo} is not of {' or '.join(names)}, who is logged in; name OWNER/NAME.")
    if role == "read":
        raise ConfigError("export.push: the hub's token only reads; log in with one that may write (`hf auth login`).")
    if (there := _files_of(api, repo)) and not overwrite:
        raise ConfigError(
            f"export.push: {repo} already has files ({', '.join(there[:3])}{', ...' if len(there) > 3 else ''}); name "
            "another repository, or set export.overwrite=true, which replaces them in a new commit."
        )


def _files_of(api: HfApi, repo: str) -> list[str]:
    with _errors(f"reading {repo}"):
        try:
            return sorted(name for name in api.list_repo_files(repo) if name != _ATTRIBUTES)
        except RepositoryNotFoundError:
            return []


def push_files(repo: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Make these files the content of a repository, in one commit, and check them there; return the commit's URL.

    A repository that does not exist is created as a private one. Until the commit, its content is what it was.

    Raises:
        ConfigError: if the user may not write there.
        StorageError: if the hub cannot be reached, or has other files afterwards.
    """
    api = HfApi()
    with _errors(f"creating {repo}"):
        api.create_repo(repo, private=True, exist_ok=True)
    gone = sorted(set(_files_of(api, repo)) - files.keys())
    operations: list[Any] = [CommitOperationAdd(name, _content(file)) for name, file in sorted(files.items())]
    operations += [CommitOperationDelete(name, is_folder=False) for name in gone]
    with _errors(f"uploading to {repo}"):
        done = api.create_commit(repo, operations, commit_message=message)
        there = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, revision=done.oid)}
    for name, file in files.items():
        if not _is_there(there.get(name), file):
            raise StorageError(f"export.push: {name} is not in {repo} as it was uploaded; push again.")
    return str(done.commit_url)


def _content(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)


def _is_there(entry: Any, file: Path | bytes) -> bool:
    """Whether the hub's entry of a file has its content: by sha256 for large files, else by git's hash of a blob."""
    if entry is None:
        return False
    if entry.lfs is not None:
        ours = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else file_sha256(file)
        return bool(entry.lfs.sha256 == ours)
    data = file if isinstance(file, bytes) else file.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def token_secrets() -> list[str]:
    """Return the texts that must not be in anything that is uploaded: the login's token."""
    return [text for text in (get_token(), os.environ.get("HF_TOKEN")) if text]
