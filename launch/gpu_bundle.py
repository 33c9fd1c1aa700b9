"""Build a folder with which tests/gpu/run.sh runs on a CUDA machine that has no network.

    python launch/gpu_bundle.py --out build/gpu-bundle      (make gpu-bundle)

The machine is taken to be Linux on x86-64 with Python 3.12, CUDA 13, torch and transformers (and what these two need,
PyYAML among it). The folder brings the rest: the project with its tests, the pure-Python packages, and bitsandbytes cut
to its CPU and CUDA 13 libraries, all at the versions of requirements.lock. Copy it there, then:

    tests/gpu/run.sh            (inside the copy; or BUNDLE=build/gpu-bundle tests/gpu/run.sh in a checkout)

`datasets` and `wandb` cannot come along: they stand on large compiled packages. So the tests in tests/gpu build their
token rows themselves and import nothing that imports `datasets`.

Exit codes: 0 built, 1 something is wrong (too large, a version that does not exist), 3 there is no network.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 40 * 2**20
NO_NETWORK_EXIT_CODE = 3

PURE = (
    "accelerate", "hydra-core", "iniconfig", "liger-kernel", "markdown-it-py", "mdurl", "omegaconf", "peft", "pluggy",
    "Pygments", "pytest", "pytest-timeout", "rich",
)  # fmt: skip
"""Packages that are Python alone and that transformers does not bring."""
COMPILED = ("bitsandbytes", "psutil")
"""Compiled, but for no particular Python: one wheel fits all (accelerate and peft import psutil)."""
SOURCE = "antlr4-python3-runtime"
"""Published as source only; pure Python (Hydra's grammar runs on it)."""
PROJECT = ("fsdp_qlora", "conf", "tests", "pyproject.toml", "LICENSE")

_PYTHON = "3.12"
# pip takes a platform's name literally: a wheel for glibc 2.24 is not found under the name of glibc 2.28.
_PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 40)))
_KEPT_LIBRARY = re.compile(r"libbitsandbytes_(cpu|cuda13\d*)\.so")
_MARK = "packages.txt"


class BundleError(Exception):
    """What went wrong, and the exit code for it."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def locked_versions(names: tuple[str, ...], lock: Path) -> dict[str, str]:
    """Return the version of each package in ``lock``.

    Raises:
        BundleError: if one is not there.
    """
    pins = dict(line.split("==", 1) for line in lock.read_text().split() if "==" in line)
    by_name = {_normalized(name): version for name, version in pins.items()}
    if missing := [name for name in names if _normalized(name) not in by_name]:
        raise BundleError(f"{lock.name} pins no {', '.join(missing)}.")
    return {name: by_name[_normalized(name)] for name in names}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(requirements: list[str], folder: Path, *options: str) -> list[Path]:
    """Let pip fetch ``requirements``, without what they need, into ``folder``; return the files.

    Raises:
        BundleError: with what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--dest", str(folder), *options]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip()
        if "Retrying (Retry(" in said or "connection" in said.lower():
            raise BundleError(f"no package index can be reached: {said.splitlines()[-1]}", NO_NETWORK_EXIT_CODE)
        raise BundleError(f"pip cannot get {' '.join(requirements)}:\n{said}")
    return sorted(folder.iterdir())


def download_wheels(requirements: list[str], folder: Path) -> list[Path]:
    """Fetch wheels for the target machine, whatever machine this is."""
    platforms = [option for name in _PLATFORMS for option in ("--platform", f"{name}_x86_64")]
    target = ["--only-binary=:all:", "--python-version", _PYTHON, "--implementation", "cp", *platforms]
    return download(requirements, folder, *target)


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Unpack a wheel into ``site``, without its scripts and without libraries for other devices."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            other_device = path.name.startswith("libbitsandbytes_") and not _KEPT_LIBRARY.fullmatch(path.name)
            # RECORD would list what is left out here.
            if not other_device and path.name != "RECORD" and not path.parts[0].endswith(".data"):
                archive.extract(name, site)


def unpack_source(archive_file: Path, package: str, site: Path) -> None:
    """Unpack the folder ``src/<package>`` of a source archive into ``site``."""
    with tarfile.open(archive_file) as archive:
        for member in archive.getmembers():
            _, _, inside = member.name.partition("/src/")
            if member.isfile() and inside.startswith(f"{package}/") and ".." not in inside.split("/"):
                target = site / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = archive.extractfile(member)
                assert stream is not None
                target.write_bytes(stream.read())


def copy_project(folder: Path) -> None:
    """Copy the code, its settings and its tests."""
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
        else:
            shutil.copy2(source, folder / name)


def build(folder: Path) -> None:
    """Fill the new ``folder``."""
    versions = locked_versions((*PURE, *COMPILED, SOURCE), ROOT / "requirements.lock")
    site = folder / "site"
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as scratch:
        wheels, sources = Path(scratch) / "wheels", Path(scratch) / "sources"
        for wheel in download_wheels([f"{name}=={versions[name]}" for name in (*PURE, *COMPILED)], wheels):
            unpack_wheel(wheel, site)
        for archive in download([f"{SOURCE}=={versions[SOURCE]}"], sources, f"--no-binary={SOURCE}"):
            unpack_source(archive, "antlr4", site)
    check_site(site)
    copy_project(folder)
    (folder / _MARK).write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))


def check_site(site: Path) -> None:
    """Check that what was unpacked is what the machine needs.

    Raises:
        BundleError: if bitsandbytes' layout changed, or there is compiled code for one Python only.
    """
    libraries = sorted(file.name for file in (site / "bitsandbytes").glob("*.so"))
    if "libbitsandbytes_cpu.so" not in libraries or not any("_cuda13" in name for name in libraries):
        raise BundleError(f"bitsandbytes' wheel lacks its CPU or CUDA 13 library (kept: {', '.join(libraries)}).")
    if tied := [file.name for file in site.rglob("*.cpython-*.so")]:
        raise BundleError(f"compiled for one Python only: {', '.join(tied)}.")


def size_of(folder: Path) -> int:
    """Return the bytes of all files under ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> int:
    """Build the bundle, print its size, and return the exit code."""
    parser = argparse.ArgumentParser(description="Build what tests/gpu/run.sh needs on a CUDA machine without network.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle", help="folder to build, made anew")
    out = parser.parse_args().out.absolute()
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        print(f"gpu-bundle: {out} is there and is no bundle; choose another folder.", file=sys.stderr)
        return 1
    staging = out.with_name(f".{out.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        build(staging)
    except BundleError as error:
        shutil.rmtree(staging, ignore_errors=True)
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return error.code
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    size = size_of(out)
    print(f"{out}: {size / 2**20:.1f} MiB of {LIMIT_BYTES / 2**20:.0f}")
    if size > LIMIT_BYTES:
        print("gpu-bundle: over the limit; what grew?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
