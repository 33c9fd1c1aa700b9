"""What of an export may be read by strangers: no path of this machine, no secret, a base that they can fetch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdp_qlora.errors import SecurityError
from fsdp_qlora.export.hub_card import adapter_card, model_card
from fsdp_qlora.export.published import HubBase, hub_base, published_files, require_clean, without_paths
from fsdp_qlora.files.home import cache_folder

CARD = (
    "---\nbase_model: /srv/models/base\n---\n| | |\n|---|---|\n| Base model | `/srv/models/base` |\n| Loss | 1.3 |\n\n"
    'base = load("/srv/models/base")\nmodel = load(base, "path/to/this/folder")\n'
)


def test_a_base_is_a_hub_id_with_its_revision_or_nothing(tmp_path):
    cached = tmp_path / "models--org--model/snapshots/0123abc"
    cached.mkdir(parents=True)
    assert hub_base("org/name", "main") == HubBase("org/name", "main")
    assert hub_base(str(cached), None) == HubBase("org/model", "0123abc")
    assert hub_base(str(tmp_path), None) is None and hub_base(None, None) is None


@pytest.mark.parametrize(("text", "clean"), [
    ("| Data | /srv/my data/x.jsonl |", "| Data | my data/x.jsonl |"),
    ("see /srv/data/rows.jsonl, ~/own/rows.jsonl.", "see rows.jsonl, rows.jsonl."),
    ("https://host/a/b.jsonl hf://a/b s3://c/d", "https://host/a/b.jsonl hf://a/b s3://c/d"),
    ("1/2 and/or data/rows.jsonl </a/b>", "1/2 and/or data/rows.jsonl </a/b>"),
])  # fmt: skip
def test_absolute_paths_become_names(text, clean):
    assert without_paths(text) == clean


def test_a_card_names_what_others_can_fetch():
    card = adapter_card(CARD, "ann/tuned", HubBase("org/base", "abc"))
    assert "base_model: org/base\n" in card and 'load("org/base", revision="abc")' in card
    assert 'load(base, "ann/tuned")' in card and "srv" not in card and "Loss | 1.3" in card
    unknown = adapter_card(CARD, "ann/tuned", None)
    assert "base_model:" not in unknown and "not on the hub" in unknown and "srv" not in unknown
    assert "tags" in adapter_card(None, "ann/tuned", None)
    merged = model_card("merged", "ann/tuned", HubBase("org/base"), CARD)
    assert "base_model_relation: finetune" in merged and "| Loss | 1.3 |" in merged and "srv" not in merged


def _adapter(folder: Path, **config: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/base", **config}))
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / ".env").write_text("TOKEN=1")
    (folder / "run.log").write_text("x")
    return folder


def test_only_known_files_are_published_and_a_secret_or_a_path_in_them_is_refused(tmp_path):
    folder = _adapter(tmp_path / "adapter")
    files = published_files(folder, None, "card")
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    require_clean(files, [tmp_path], ["hf_secret"])
    for name, text in (
        ("a", f"in {tmp_path}/x"),
        ("b", "hf_secret"),
        ("c", "https://ann:s3same@host/x"),
        ("d", f"{Path.home()}/x"),
    ):
        with pytest.raises(SecurityError, match="nothing was uploaded") as refused:
            require_clean({**files, name: text.encode()}, [tmp_path], ["hf_secret"])
        assert "hf_secret" not in str(refused.value) and "s3same" not in str(refused.value)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors", metadata={"made": f"in {tmp_path}"})
    with pytest.raises(SecurityError, match=r"other\.safetensors"):
        require_clean(published_files(folder, None, "card"), [tmp_path], [])
    (folder / "link.json").symlink_to(cache_folder() / "elsewhere.json")
    with pytest.raises(SecurityError, match="link"):
        published_files(folder, None, "card")
