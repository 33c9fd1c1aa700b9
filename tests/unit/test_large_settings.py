"""R17: settings that are longer than the kernel lets a variable or an argument be reach the ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fsdp_qlora.cli import launcher
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.run.exit import CONFIG_VARIABLE


def test_settings_of_a_megabyte_reach_the_ranks(monkeypatch):
    """R17: a real process is started with what the launcher gives it; above 128 KiB a string would be E2BIG."""
    prompts = ["x" * 1_000_000]
    config = from_dict({"train": {"sample_prompts": prompts}})
    seen: dict[str, Any] = {}
    start = subprocess.Popen

    def agent(command: list[str], env: dict[str, str], **settings: Any) -> subprocess.Popen[bytes]:
        seen["config"] = json.loads(Path(env[CONFIG_VARIABLE]).read_text())
        return start([sys.executable, "-c", "pass", *command[1:]], env=env, **settings)

    monkeypatch.setattr(subprocess, "Popen", agent)
    assert launcher.launch("evaluate", config, 2) == 1, "no rank has said how it ended"
    assert seen["config"] == to_dict(config) and seen["config"]["train"]["sample_prompts"] == prompts
