"""Are losses, gradient norms and adapters of two commits equal, bit for bit? ``python -m tools.same_numbers COMMIT``.

Each case trains the same model on the same rows with the code of COMMIT and with that of this checkout, in fresh
processes on this machine; one is begun with the old code and resumed with the new. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import tiny
from tests.build import essence, metrics

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix_8bit", "sgd", "adafactor")
CASES: dict[str, list[str]] = {
    "nf4": [],
    "fp4": ["quant=fp4"],
    "int8": ["quant=int8"],
    "none": ["quant=none"],
    "blocks of 128, not nested": ["quant.block_size=128", "quant.double_quant=false"],
    "fp32": ["precision=fp32"],
    "embeddings": ["quant.embeddings=nf4"],
    "overrides": ["quant.overrides={*.v_proj:int8,*.o_proj:none}"],
    "packed": ["data.packing=true"],
    "replicated": ["fsdp.adapters=replicated"],
    "dropout, rslora": ["lora.dropout=0.1", "lora.variant=rslora"],
    "checkpointed": ["train.activation_checkpointing=selective"],
    "compiled": ["train.compile=true"],
    "three ranks": ["launcher.nproc_per_node=3"],
} | {name: [f"optim={name}"] for name in OPTIMIZERS}
"""Name -> what it sets beside the common settings."""


def settings_of(folder: Path) -> list[str]:
    """Make a small model and rows in ``folder``; return the settings that all cases share."""
    model = tiny.make_model(folder / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    rows = tiny.write_chat_rows(folder / "rows.jsonl", 64)
    return [
        f"model.name={model}", f"data.train={rows}", "data.eval_fraction=0.1", "data.max_length=96", "lora.r=8",
        "train.max_steps=20", "train.global_batch_size=6", "train.micro_batch_size=2", "train.eval_every=10",
        "checkpoint.every_steps=10", "checkpoint.resume=auto", "optim.lr=2e-3", "train.compile=false",
        "launcher.nproc_per_node=2", "launcher.device=cpu",
    ]  # fmt: skip


def _tensors(file: Path) -> bytes:
    """Return a safetensors file without its header, which also says what the base was."""
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def train(checkout: Path, name: str, root: Path, settings: list[str]) -> dict[str, object]:
    """Train with the code of ``checkout``; return what must be equal.

    Raises:
        SystemExit: if it fails.
    """
    command = [sys.executable, "-m", "fsdp_qlora", "train", *settings, f"run.name={name}", f"run.output_root={root}"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    adapter = root / name / "adapter/adapter_model.safetensors"
    return {"lines": essence(metrics(root / name)), "adapter": hashlib.sha256(_tensors(adapter)).hexdigest()}


def differs(old: dict[str, object], new: dict[str, object]) -> str:
    """Return the first difference in words, or nothing."""
    if old == new:
        return ""
    for before, after in zip(old["lines"], new["lines"], strict=False):  # type: ignore[call-overload]
        if before != after:
            return f"{before} became {after}"
    return "the adapters differ" if old["lines"] == new["lines"] else "one of them has more lines"


def main() -> int:
    """Compare; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="the commit to compare this checkout with")
    parser.add_argument("--only", nargs="*", default=None, help="names of cases; 'quickstart' and 'resumed' are two")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder, old = Path(scratch), Path(scratch) / "old"
        worktree = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*worktree, "add", "--quiet", "--detach", old, options.commit], check=True)
        try:
            common = settings_of(folder)
            quickstart = ["experiment=quickstart", "train.max_steps=20", "train.sample_prompts=[]"]
            cases = {"quickstart": quickstart} | {name: [*common, *more] for name, more in CASES.items()}
            for name, settings in cases.items():
                if options.only and name not in options.only:
                    continue
                found = []
                for place, checkout in (("before", old), ("after", ROOT)):
                    root = folder / place
                    root.mkdir(exist_ok=True)
                    found.append(train(checkout, name.replace(" ", "_").replace(",", ""), root, settings))
                problem = differs(*found)
                wrong += bool(problem)
                print(f"{name}: {problem or 'equal'}", flush=True)
            if not options.only or "resumed" in options.only:
                wrong += _resumed(folder, old, common)
        finally:
            subprocess.run([*worktree, "remove", "--force", old], check=True)
    return 1 if wrong else 0


def _resumed(folder: Path, old: Path, common: list[str]) -> bool:
    """Whether a run that the old code began and the new one ended differs from one that the old code ended."""
    constant = [*common, "schedule=constant"]
    whole = train(old, "whole", folder, constant)
    train(old, "split", folder, [*constant, "train.max_steps=10"])
    problem = differs(whole, train(ROOT, "split", folder, [*constant, "checkpoint.resume=auto"]))
    print(f"resumed: {problem or 'equal'}", flush=True)
    return bool(problem)


if __name__ == "__main__":
    sys.exit(main())
