"""S7, R13: a checkpoint of somebody's: links are refused, nothing else is copied, odd ones are one line and no hang."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.differences import contrast
from fsdp_qlora.checkpoint.manifest import COMPLETE, MANIFEST
from fsdp_qlora.cli import export, inspect
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import CheckpointError, ConfigError, FsdpQloraError, ModelError, SecurityError
from fsdp_qlora.run.claim import _decide
from fsdp_qlora.run.folder import RunFolder
from tests.forged import NAME, SHARD, make_checkpoint, vouch, vouch_for

SECRET = "CANARY: the user's own key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs/run/checkpoints/step_00000002"


@pytest.fixture
def manifest(folder: Path) -> dict[str, Any]:
    return make_checkpoint(folder)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder of the user's with something that must not be given away."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("key.txt", "key.json", "README.md"):
        (home / name).write_text(json.dumps(SECRET))
    return home


def _export(tmp_path: Path, **settings: Any) -> Path:
    to = tmp_path / "given_away"
    groups = {"run": {"output_root": str(tmp_path / "outputs"), "name": "run"}, "export": {"to": str(to), **settings}}
    assert export.run(from_dict(groups)) == 0
    return to


def test_an_honest_one_is_exported_and_only_what_the_manifest_names(tmp_path, folder, manifest):
    """S7: and its files are those that were verified."""
    to = _export(tmp_path)
    assert {f.name for f in to.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for file in to.iterdir():
        assert file.read_bytes() == (folder / "adapter" / file.name).read_bytes()
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


LINKS = {
    "a folder beside the adapter": ("private", "."),
    "a folder in the adapter": ("adapter/private", "."),
    "a file in the adapter": ("adapter/key.txt", "key.txt"),
    "a file that the manifest names": ("adapter/README.md", "README.md"),
    "the adapter itself": ("adapter", "."),
    "to nothing": ("adapter/none.txt", "none"),
    "the manifest": (MANIFEST, "key.json"),
    "its seal": (COMPLETE, "key.txt"),
    "a shard": (SHARD, "key.txt"),
    "inside": ("adapter/more.json", "../outputs/run/checkpoints/step_00000002/adapter/adapter_config.json"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_any_link_in_a_checkpoint_is_refused(tmp_path, folder, manifest, private, kind):
    """S7: what it leads to would be read, and given away as a part of it."""
    name, aim = LINKS[kind]
    place = folder / name
    if place.is_dir():
        place.rename(folder.parent / "away")
    place.unlink(missing_ok=True)
    place.symlink_to(private / aim)
    if kind == "a file that the manifest names":
        manifest["files"][name] = {}
        vouch(folder, manifest)
    for refused in (lambda: open_checkpoint(folder), lambda: _export(tmp_path), lambda: inspect.run([str(folder)])):
        with pytest.raises(SecurityError, match="is a link") as found:
            refused()
        assert found.value.exit_code == 77 and place.name in str(found.value)
    assert not (tmp_path / "given_away").exists()


@pytest.mark.parametrize("level", ["checkpoints", "step"])
def test_a_run_folder_whose_checkpoints_are_links_to_the_users_own_is_refused(tmp_path, level):
    """S7: a stranger's run folder gives none of the user's own adapters away."""
    own = tmp_path / "own/step_00000002"
    make_checkpoint(own)
    run = tmp_path / "outputs/run"
    run.mkdir(parents=True)
    if level == "checkpoints":
        (run / "checkpoints").symlink_to(own.parent)
    else:
        (run / "checkpoints").mkdir()
        (run / "checkpoints/step_00000002").symlink_to(own)
    with pytest.raises(SecurityError, match="is a link"):
        _export(tmp_path)
    assert _export(tmp_path, checkpoint=str(own)).is_dir(), "what a person names is theirs"


def test_an_export_writes_through_no_link_of_its_target(tmp_path, folder, manifest, private):
    """S8: neither the run folder's adapter as a link, nor files in it."""
    (tmp_path / "outputs/run/adapter").symlink_to(private)
    groups = {"run": {"output_root": str(tmp_path / "outputs"), "name": "run"}}
    with pytest.raises(SecurityError, match="adapter is a link"):
        export.run(from_dict(groups))
    (tmp_path / "given_away").mkdir()
    (tmp_path / "given_away/adapter_config.json").symlink_to(private / "key.json")
    with pytest.raises(ModelError, match=r"export\.overwrite=true"):
        _export(tmp_path)
    _export(tmp_path, overwrite=True)
    assert SECRET in (private / "key.json").read_text()
    assert not (tmp_path / "given_away/adapter_config.json").is_symlink()


def test_a_second_chat_template_is_no_stranger(folder, manifest):
    """S7: transformers keeps more templates in a folder of their own."""
    name = "adapter/additional_chat_templates/tools.jinja"
    (folder / name).parent.mkdir()
    (folder / name).write_text("{{ messages }}")
    manifest["files"][name] = {}
    vouch(folder, manifest)
    open_checkpoint(folder)


@pytest.mark.parametrize("name", [MANIFEST, COMPLETE, SHARD, "adapter/adapter_config.json"])
@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(folder, manifest, name):
    """R13: opening it would hang."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((SecurityError, CheckpointError), match=Path(name).name):
        open_checkpoint(folder)


def test_files_without_end_are_refused_unread(folder, manifest):
    """R13: a sparse file costs nothing to send."""
    for name in (MANIFEST, COMPLETE, "adapter/adapter_config.json"):
        data = (folder / name).read_bytes()
        os.truncate(folder / name, 2**40)
        with pytest.raises((SecurityError, CheckpointError), match=Path(name).name):
            open_checkpoint(folder)
        (folder / name).write_bytes(data)
    open_checkpoint(folder)


def test_tensors_of_one_checkpoint_alone_are_not_counted_as_equal(tmp_path, folder, manifest, capsys):
    other = tmp_path / "other/step_00000002"
    more = make_checkpoint(other)
    for side, name in ((folder, "a"), (other, "b"), (other, "c")):
        file = f"shard-0000{'abc'.index(name) + 2}-model-00001-of-00001.safetensors"
        save_file({f"model.{name}": torch.ones(2)}, side / file)
        changed = manifest if side == folder else more
        changed["tensors"][f"model.{name}"] = [2]
        changed["files"][file] = {}
        vouch(side, changed)
    assert inspect.run([str(folder), str(other)]) == 1
    assert "2 tensors are bit-equal, 3 are not; 0 settings differ." in capsys.readouterr().out


WRONG = [None, True, -1, 0.5, 10**30, float("nan"), float("inf"), "x", "", [], [[]], {}, {"x": {"y": []}}, [-1], [10**18] * 4,
         ["1"], [1] * 100_000, {"": None}, {"../x": {"size": 1, "sha256": "0" * 64}}]  # fmt: skip
PLACES = [("format",), ("step",), ("world_size",), ("progress",), ("identity",), ("tensors",), ("files",), ("versions",),
          ("progress", "step"), ("progress", "recent_losses"), ("progress", "best_eval_loss"), ("progress", "advance"),
          ("tensors", f"model.{NAME.format('A')}"), ("tensors", "other"), ("files", SHARD), ("files", "other"),
          ("files", SHARD, "size"), ("files", SHARD, "sha256"), ("versions", "torch"), ("other",)]  # fmt: skip


def _ends_well(folder: Path) -> None:
    """Check that it is opened, or refused in one line for the right reason."""
    try:
        saved = open_checkpoint(folder)
        list(contrast(saved, saved))
        inspect.run([str(folder)])
    except (SecurityError, CheckpointError) as error:
        assert str(folder) in str(error) and len(str(error)) < 2000 and "\n" not in str(error)


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_manifest_with_wrong_types_ends_well(folder, manifest, place):
    """R13: under a COMPLETE that vouches for it; every value at every key."""
    refused = 0
    for value in WRONG:
        changed = copy.deepcopy(manifest)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        vouch_for(folder, json.dumps(changed).encode())
        _ends_well(folder)
        try:
            open_checkpoint(folder)
        except FsdpQloraError:
            refused += 1
    assert refused >= (0 if place == ("identity",) else 10)


BYTES = {
    "nothing": b"", "no JSON": b"{", "no UTF-8": b"\xff\xfe{}", "a list": b"[]", "a number": b"1" * 5000, "null": b"null",
    "deep": b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "NUL": b"\0", "a BOM": b"\xef\xbb\xbf{}",
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_a_manifest_that_is_none_is_refused(folder, manifest, kind):
    """R13: with 77, since COMPLETE vouches for it."""
    vouch_for(folder, BYTES[kind])
    with pytest.raises(SecurityError, match="is not a manifest"):
        open_checkpoint(folder)


@pytest.mark.parametrize("levels", [65, 900])
def test_a_key_twice_and_deep_values_are_refused(folder, manifest, levels):
    """R13: of two values one reader takes this one, another that one; deep ones end whoever writes them out again."""
    text = json.dumps(manifest)
    vouch_for(folder, text.replace('"step": 2,', '"step": 2, "step": 4,', 1).encode())
    with pytest.raises(SecurityError, match="twice"):
        open_checkpoint(folder)
    manifest["identity"] = {"x": json.loads("[" * levels + "]" * levels)}
    vouch_for(folder, json.dumps(manifest).encode())
    with pytest.raises(SecurityError, match="nested"):
        open_checkpoint(folder)


def test_random_damage_to_a_manifest_ends_well(folder, manifest):
    """R13: bytes that were changed by a forger who vouches for them."""
    draw = random.Random(13)
    text = json.dumps(manifest).encode()
    for _ in range(300):
        data = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 3)] = draw.choice([b"", b"{", b"]", b'"', b"-", b"1e999", b"null", b"\xff"])
        vouch_for(folder, bytes(data))
        _ends_well(folder)


PLACING = [None, [], "x", {}, {"saved_offsets": None}, {"saved_offsets": [0]}, {"saved_offsets": [0.0, 0.0]},
           {"saved_offsets": [float("nan"), 0]}, {"saved_offsets": ["0", "0"]}, {"saved_offsets": [10**30, 0]},
           {"saved_offsets": [True, 0]}, {"saved_offsets": [-1, 0]}, {"saved_offsets": [0, 0], "more": [[]]}]  # fmt: skip


@pytest.mark.parametrize("info", PLACING, ids=repr)
def test_a_shard_that_says_odd_things_of_its_place_ends_well(folder, manifest, info):
    """R13: the shards' own headers are read, too."""
    name, tensor = f"model.{NAME.format('A')}", torch.ones(2, 8)
    other = f"model.{NAME.format('B')}"
    places = {name: info, other: {"saved_offsets": [0, 0]}}
    for text in (
        json.dumps(places),
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        json.dumps(places)[:-1],
        json.dumps([places]),
    ):
        header = {"DCP_SHARDING_INFO": text, "format": "pt"}
        save_file({name: tensor, other: torch.ones(8, 2)}, folder / SHARD, metadata=header)
        vouch(folder, manifest)
        _ends_well(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_numbers_is_not_given_away(tmp_path, folder, value):
    """R14: it would answer nonsense wherever it is loaded."""
    make_checkpoint(folder, value)
    with pytest.raises(ModelError, match="not finite"):
        _export(tmp_path)
    assert not (tmp_path / "given_away").exists()


ODD_RUNS = [
    "[]",
    "x",
    "{",
    "run: 3",
    "run: {seed: 1}",
    "run: {seed: 1}\nmodel: []",
    "{run: {}, train: 1}",
    "\0",
    "a: &a [*a]",
]


@pytest.mark.parametrize("text", [*ODD_RUNS, "train"])
@pytest.mark.parametrize("finished", [None, "[]", "{", '{"steps": "x"}'])
def test_a_run_folder_with_odd_settings_is_one_line(tmp_path, folder, manifest, text, finished):
    """R13: a second start reads what the first one wrote, or somebody in its name."""
    run = RunFolder(str(tmp_path / "outputs"), "run")
    config = from_dict({"run": {"output_root": str(tmp_path / "outputs"), "name": "run"}, "train": {"max_steps": 2}})
    settings = to_dict(config) | {"train": {"max_steps": 1, "num_epochs": 1.0}}
    run.config_file.write_text(json.dumps(settings) if text == "train" else text)
    if finished is not None:
        run.summary_file.write_text(finished)
    with pytest.raises(ConfigError) as told:
        _decide(run, config)
    assert told.value.exit_code == 2 and str(run.path) in str(told.value)
