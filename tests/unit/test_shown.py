"""S3: what a run writes for others to read holds no secret of a URL."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.export.card import model_card
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import has_password, published, shown_source

SHOWN = {
    "https://host/a/rows.jsonl?X-Amz-Signature=CANARY&b=1#CANARY": "https://host/a/rows.jsonl",
    "https://ann:CANARY@host:8443/rows.jsonl": "https://host:8443/rows.jsonl",
    "https://CANARY@host/rows.jsonl": "https://host/rows.jsonl",
    "s3://bucket/rows.parquet?versionId=CANARY": "s3://bucket/rows.parquet",
    "sftp://ann:p@CANARY@host/rows.csv": "sftp://host/rows.csv",
    "https://[CANARY/rows": "https://...",
    "hf://datasets/a/b@main/rows.jsonl": "hf://datasets/a/b@main/rows.jsonl",
    "rows?.jsonl": "rows?.jsonl",
    "me@home/rows.jsonl": "me@home/rows.jsonl",
}


@pytest.mark.parametrize("source", SHOWN)
def test_a_source_is_shown_without_its_secrets(source):
    assert shown_source(source) == SHOWN[source]


@pytest.mark.parametrize("train", [next(iter(SHOWN)), list(SHOWN)], ids=["one", "several"])
def test_nothing_that_is_written_holds_them(tmp_path, train):
    config = from_dict({"model": {"name": "m"}, "data": {"train": train, "eval": next(iter(SHOWN))}})
    settings = published(to_dict(config))
    folder = RunFolder(str(tmp_path), "run")
    folder.path.mkdir()
    folder.begin(settings)
    facts = dict.fromkeys(("base_model", "train_rows", "steps", "eval_loss_before", "eval_loss_after")) | {
        "trainable_parameters": 1, "versions": {},
    }  # fmt: skip
    written = [json.dumps(settings), model_card(settings, facts), folder.config_file.read_text()]
    assert not any("CANARY" in text for text in written)
    kept = yaml.safe_load(folder.config_file.read_text())["data"]["train"]
    assert kept == (SHOWN[train] if isinstance(train, str) else list(SHOWN.values()))
    assert config.data.train == train, "it is used as it was given"


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_password_is_refused_and_not_repeated(key):
    config = RunConfig()
    bad = "https://ann:CANARY@host/rows.jsonl"
    assert has_password(bad) and not has_password("https://host/a:b@c")
    for value in (bad, ["a.jsonl", bad]):
        changed = replace(config, data=replace(config.data, **{"train": "a.jsonl", key: value}))
        with pytest.raises(ConfigError, match=r"data\.\w+: the URL https://host/rows.jsonl .* password") as refused:
            check(changed)
        assert "CANARY" not in str(refused.value) and "ann" not in str(refused.value)
