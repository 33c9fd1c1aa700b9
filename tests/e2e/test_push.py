"""`export.push=REPO`: what the hub then has, and what it must not have. The hub is a stand-in on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests import hub
from tests.tiny import make_model
from tests.upstream import add_noise

pytestmark = [pytest.mark.launch, pytest.mark.full]
REPO = "ann/tuned"
CARD = """---
base_model: {base}
library_name: peft
---

# run

| | |
|---|---|
| Base model | `{base}` |
| Data | /srv/data/rows.jsonl, https://host/rows.jsonl (48 sequences) |
| Held-out loss after | 1.3467 |

```python
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
AutoTokenizer.from_pretrained(sys.argv[1])
assert any("lora_A" in name for name, _ in model.named_parameters()) == (sys.argv[3] == "served"), sys.argv
torch.save(model(input_ids=torch.arange(16)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows are whole blocks: bitsandbytes' CPU kernel fails on others."""
    return make_model(tmp_path_factory.mktemp("private") / "base", intermediate_size=384)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of stock PEFT with a run's card and a stranger's file in it."""
    folder = tmp_path_factory.mktemp("private") / "adapter"
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(dense, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    add_noise(model, 0.1)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(base=base))
    (folder / "notes.log").write_text("mine alone")
    return folder


def _require_clean(files: dict[str, bytes], *private: Path) -> None:
    """Check every byte of what the hub has."""
    for name, content in files.items():
        for text in (hub.TOKEN, str(Path.home()) + "/", *map(str, private)):
            vocabulary = name == "tokenizer.json" and text == str(Path.home()) + "/"
            assert vocabulary or text.encode() not in content, (name, text)


def test_an_adapter_is_read_back_as_it_was_exported(cli, base, adapter, tmp_path):
    with hub.running() as there:
        env = there.env(tmp_path / "home")
        words = [f"adapter={adapter}", "export.to=given", f"export.push={REPO}"]
        done = cli("export", *words, cold=True, **env)
        assert done.returncode == 0, done.stderr
        assert f"{there.url}/{REPO}/commit/" in done.stdout and "names no base model" in done.stdout
        files = there.repos[REPO]
        assert there.private[REPO] and len(there.commits) == 1
        assert files.keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        given = tmp_path / "given"
        assert files["adapter_model.safetensors"] == (given / "adapter_model.safetensors").read_bytes()
        config = json.loads(files["adapter_config.json"])
        own = json.loads((given / "adapter_config.json").read_text())
        assert config == own | {"base_model_name_or_path": None, "revision": None}
        card = files["README.md"].decode()
        assert "base_model:" not in card and "1.3467" in card and "rows.jsonl, https://host/rows.jsonl" in card
        assert f'PeftModel.from_pretrained(base, "{REPO}")' in card
        _require_clean(files, base, adapter, tmp_path)
        assert hub.TOKEN not in done.stdout + done.stderr

        again = cli("export", *words[:1], "export.to=other", *words[2:], cold=True, **env)
        assert again.returncode == 2 and "export.overwrite=true" in again.stderr and not (tmp_path / "other").exists()
        (given / "stale.json").write_text("{}")
        more = ["export.overwrite=true", "model.name=org/model", "model.revision=abc"]
        done = cli("export", *words, *more, cold=True, **env)
        assert done.returncode == 0, done.stderr
        config = json.loads(there.repos[REPO]["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")
        assert "base_model: org/model\n" in there.repos[REPO]["README.md"].decode()
        assert "stale.json" not in there.repos[REPO] and not (given / "stale.json").exists()


@pytest.mark.parametrize("what", ["served", "merged"])
def test_a_model_is_read_back_by_plain_transformers(cli, base, adapter, tmp_path, what):
    with hub.running() as there:
        env = there.env(tmp_path / "home")
        words = [f"what={what}", f"adapter={adapter}", "export.to=given", f"export.push={REPO}", "launcher.device=cpu"]
        done = cli("export", *words, cold=True, **env)
        assert done.returncode == 0, done.stderr
        files = there.repos[REPO]
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
        assert not {"merged.json", "served.json", "notes.log"} & files.keys()
        assert "1.3467" in files["README.md"].decode()
        _require_clean(files, base, adapter, tmp_path)
        logits = []
        for name in (REPO, str(tmp_path / "given")):
            words = [sys.executable, "-c", READ, name, str(tmp_path / "logits.pt"), what]
            read = subprocess.run(words, env=_own(env), capture_output=True, text=True, timeout=600, check=False)
            assert read.returncode == 0, read.stderr
            logits.append(torch.load(tmp_path / "logits.pt"))
        assert torch.equal(*logits)
        cached = list(
            (tmp_path / "home").rglob("adapter_model.safetensors" if what == "served" else "model.safetensors")
        )
        with safe_open(cached[0], framework="pt") as stored:
            assert stored.keys()


def _own(env: dict[str, Any]) -> dict[str, str]:
    import os

    return {**os.environ, **env}


def test_without_a_login_nothing_is_begun(cli, adapter, tmp_path):
    with hub.running() as there:
        words = [f"adapter={adapter}", "export.to=given", f"export.push={REPO}"]
        done = cli("export", *words, cold=True, **there.env(tmp_path / "home", token=None))
        assert done.returncode == 2 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
        assert not there.requests and not (tmp_path / "given").exists()


@pytest.mark.parametrize(("repo", "hub_settings", "token", "code", "said"), [
    (REPO, {}, "hf_wrong", 2, "hf auth login"),
    (REPO, {"role": "read"}, hub.TOKEN, 2, "only reads"),
    ("bob/tuned", {}, hub.TOKEN, 2, "not of ann or zoo"),
    (REPO, {"fails_at": "whoami"}, hub.TOKEN, 74, "export.push:"),
    (REPO, {"fails_at": "/commit/"}, hub.TOKEN, 74, "uploading to ann/tuned"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_message(cli, adapter, tmp_path, repo, hub_settings, token, code, said):
    with hub.running(**hub_settings) as there:
        words = [f"adapter={adapter}", "export.to=given", f"export.push={repo}"]
        done = cli("export", *words, cold=True, **there.env(tmp_path / "home", token=token))
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and token not in done.stderr
        late = hub_settings.get("fails_at") == "/commit/"
        assert (tmp_path / "given").exists() == late  # the export itself is whole
        assert not there.commits and set(there.repos.get(REPO, {})) <= {".gitattributes"}
