"""Reports in a real browser: nothing is asked from outside, nothing complains, and axe-core finds no serious fault.

Needs `chromium`, `node`, and FSDP_QLORA_TEST_BROWSER naming a folder with puppeteer-core and axe-core (CONTRIBUTING.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.report.page import write_report
from tests.unit.test_report import EVIL, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = os.environ.get("FSDP_QLORA_TEST_BROWSER", "")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (CHROMIUM and shutil.which("node") and MODULES), reason=(__doc__ or "").splitlines()[2]),
]
SECTIONS = ["Overview", "Curves", "Memory", "Phases of a step", "Answers before and after", "Data", "What auto chose",
            "Settings", "Versions", "How to repeat it"]  # fmt: skip


def opened(page: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("browser.mjs")
    ran = subprocess.run(
        ["node", script, page, str(CHROMIUM), MODULES], capture_output=True, text=True, timeout=500, check=True
    )
    return json.loads(ran.stdout)


@pytest.mark.parametrize("several", [False, True])
def test_a_report_in_a_browser(tmp_path: Path, several: bool) -> None:
    runs = [make_run(tmp_path / "<b>run", evil=EVIL)]
    runs += [make_run(tmp_path / f"other{at}", lr=at / 1e3, steps=50) for at in range(1, 3) if several]
    write_report(runs, tmp_path / "page.html")
    told = opened(tmp_path / "page.html")
    assert told.keys() == {"desktop", "dark", "phone"}
    for view, said in told.items():
        assert said["errors"] == [] and said["requests"] == [], view
        assert [each for each in said["axe"] if each["impact"] in ("serious", "critical", "moderate")] == [], view
        assert said["sections"] == (["Comparison", "Curves", "Overview", *SECTIONS[2:]] if several else SECTIONS)
        assert said["overflow"] == 0, f"{view}: wider than the screen"
        assert said["focused"] == 12, f"{view}: the keyboard reaches nothing"
