"""llama.cpp's own converters to GGUF: fetched once and run as processes of their own, never imported here.

They are in no package that installs them. The source archive of llama-cpp-python holds llama.cpp's checkout, of which
the converters are unpacked; nothing is built.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fsdp_qlora.distributed.parent import die_with_parent
from fsdp_qlora.errors import ConfigError, ModelError, SecurityError, StorageError
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.files.packages import pip_download
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.parallel.compile_cache import who_else_writes

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
"""The converter of whole models, and that of adapters."""
_INSIDE = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
_UNPACKED = (MODEL, ADAPTER, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
_NEEDED = ("gguf", "sentencepiece")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "WANDB_API_KEY")
_LAST_LINES = 15
"""Lines of a failed converter's output that the message repeats."""


def require_packages() -> None:
    """Check that the packages of the converters are installed.

    Raises:
        ConfigError: naming the extra that has them.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(
            f"what=gguf: needs the package {' and '.join(missing)}, which is not installed: "
            "pip install 'fsdp-qlora[gguf]'"
        )


def converters(own: str | None, say: Callable[[str], None]) -> Path:
    """Return a folder with llama.cpp's converters: the user's own, or ours, which is filled at the first use.

    Args:
        own: a checkout of llama.cpp (``export.llama_cpp``).
        say: told of a download.

    Raises:
        ConfigError: if there are no converters in ``own``.
        ModelError: if they cannot be fetched.
        SecurityError: if others could change ours.
        StorageError: if the cache folder cannot be written.
    """
    if own is not None:
        folder = Path(own).expanduser().absolute()
        if missing := [name for name in (MODEL, ADAPTER) if not (folder / name).is_file()]:
            raise ConfigError(f"export.llama_cpp: {folder} has no {missing[0]}; give a checkout of llama.cpp.")
        return folder
    folder = cache_folder() / "llama.cpp" / PACKAGE.rpartition("=")[2]
    try:
        if not folder.is_dir():
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _fetch(folder, say)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error
    if why := who_else_writes(folder):
        raise SecurityError(f"{folder} holds code that would be run, and {why}. Remove it, or set FSDP_QLORA_CACHE.")
    return folder


def _fetch(folder: Path, say: Callable[[str], None]) -> None:
    """Unpack the converters into ``folder``, which appears when it is complete."""
    say(f"fetching llama.cpp's converters from the source archive of {PACKAGE} (77 MB)")
    with tempfile.TemporaryDirectory() as scratch, fresh_folder(folder) as staging:
        try:
            archive = pip_download(PACKAGE, SHA256, Path(scratch), "--no-binary", "llama-cpp-python")
        except ModelError as error:
            raise ModelError(
                f"what=gguf: llama.cpp's converters are not in {folder} yet: {error}. Run it once where pip reaches "
                "its index, or name a checkout of llama.cpp with export.llama_cpp=FOLDER."
            ) from error
        staging.chmod(0o700)
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(_INSIDE)
                if member.isfile() and member.name != name and name.startswith(_UNPACKED):
                    member.name = name
                    tar.extract(member, staging, filter="data")
        if missing := [name for name in _UNPACKED if not (staging / name).exists()]:
            raise ModelError(f"{PACKAGE}: its source archive contains no {missing[0]}.")
        with suppress(FileExistsError):
            staging.rename(folder)


def convert(folder: Path, script: str, arguments: Sequence[str | Path], cwd: Path) -> None:
    """Run a converter. It reads local files only, and none of this process's tokens.

    Args:
        folder: where llama.cpp's converters are.
        script: `MODEL` or `ADAPTER`.
        arguments: its command line.
        cwd: the folder to write into: in a path, the converters would replace what is in braces.

    Raises:
        ModelError: with the end of its output, if it fails.
        StorageError: if that was because the disk is full.
    """
    env = {name: value for name, value in os.environ.items() if name not in (*_SECRETS, "NO_LOCAL_GGUF")}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(folder / script), *map(str, arguments)]
    parent = os.getpid()
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False, preexec_fn=lambda: die_with_parent(parent),
    )  # fmt: skip
    if done.returncode == 0:
        return
    text = done.stdout.decode("utf-8", "replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    if "No space left on device" in text:
        raise StorageError(f"export.to: llama.cpp's {script} found no space left on the disk; free up space.")
    ended = f"ended with {done.returncode}"
    if done.returncode < 0:
        ended = f"was killed ({signal.Signals(-done.returncode).name})"
    raise ModelError(
        f"what=gguf: llama.cpp's {script} {ended}. If it does not know such a model yet, a newer one may: name a "
        "checkout of it with export.llama_cpp=FOLDER. Its last lines:\n" + "\n".join(lines)
    )
