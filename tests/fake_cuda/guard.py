"""Builds and loads the no-op device guard of `guard.cpp`. Does not import torch: the guard must be loaded before it."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path(__file__).parent / "guard.cpp"


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, so the guard cannot be built."""


def build_guard(folder: Path) -> Path:
    """Build the guard into ``folder``, unless it is there; return the library.

    Raises:
        NoCompilerError: if there is no ``g++`` or ``c++``.
    """
    key = hashlib.sha256(_SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    if library.is_file():
        return library
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NoCompilerError("no g++ and no c++ in PATH: the fake CUDA device needs one.")
    folder.mkdir(parents=True, exist_ok=True)
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    include, lib = Path(spec.origin).parent / "include", Path(spec.origin).parent / "lib"
    staged = library.with_suffix(".tmp")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1", f"-I{include}",
         f"-I{include}/torch/csrc/api/include", str(_SOURCE), f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}",
         "-o", str(staged)],
        check=True, capture_output=True,
    )  # fmt: skip
    staged.replace(library)
    return library


def load_guard(library: Path) -> None:
    """Load the guard. Cannot be undone."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
