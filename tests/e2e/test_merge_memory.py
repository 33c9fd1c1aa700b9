"""A merge within the memory that it states, enforced by a control group; FSDP_QLORA_MERGE_GB sets the base's size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

HIDDEN, INNER, VOCABULARY, RANK = 2048, 8192, 4096, 4
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
PER_LAYER = 2 * sum(out * inner for out, inner in LINEARS.values())
GB = float(os.environ.get("FSDP_QLORA_MERGE_GB", "3"))
LAYERS = max(2, round(GB * 1e9 / PER_LAYER))
SLACK = 256 * 2**20
"""What a process needs besides: its stacks, the kernel's buffers, pages of files being written."""
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def _random(name: str, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(name.encode()))
    return (torch.randn(shape[0], 1, generator=draw) * torch.randn(1, *shape[1:], generator=draw) * 0.02).bfloat16()


def _write_base(folder: Path, tokenizer: Path) -> Path:
    """Write a Llama of `GB` gigabytes, a file for each layer."""
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    edges = {
        "model.embed_tokens.weight": _random("embedding", VOCABULARY, HIDDEN),
        "lm_head.weight": _random("head", VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }  # fmt: skip
    home: dict[str, str] = {}
    for number in range(LAYERS + 1):
        tensors, file = edges, f"model-{number:05}.safetensors"
        if number < LAYERS:
            prefix = f"model.layers.{number}."
            tensors = {f"{prefix}{name}.weight": _random(prefix + name, *shape) for name, shape in LINEARS.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        save_file(tensors, folder / file, {"format": "pt"})
        home |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def _write_adapter(folder: Path, base: Path) -> Path:
    targets = [name.rpartition(".")[2] for name in LINEARS]
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    tensors = {}
    for number in range(LAYERS):
        for name, (out, inner) in LINEARS.items():
            start = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{start}.lora_A.weight"] = _random(start + "A", RANK, inner).float()
            tensors[f"{start}.lora_B.weight"] = _random(start + "B", out, RANK).float()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@contextmanager
def _group(limit: int) -> Iterator[Path]:
    """Yield the file that moves a process into a new control group, which limits memory and uses no swap."""
    version_1 = (V1 / "memory.limit_in_bytes").is_file()
    folder = (V1 if version_1 else V2) / f"fsdp_qlora_test_{os.getpid()}"
    try:
        folder.mkdir()
        if version_1:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
            (folder / "memory.swappiness").write_text("0")
        else:
            (folder / "memory.max").write_text(str(limit))
            (folder / "memory.swap.max").write_text("0")
    except OSError as error:
        pytest.skip(f"this machine lets nobody limit memory by a control group: {error}")
    try:
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def _export(env: dict[str, str], base: Path, adapter: Path, target: Path, form: str, limit: int | None) -> str:
    """Run the command, within a limit of memory if one is given; return what it said."""
    words = ["export", "what=merged", f"model.name={base}", f"adapter={adapter}", f"export.to={target}"]
    command = [sys.executable, "-m", "fsdp_qlora", *words, f"export.merge_base={form}", "export.overwrite=true"]
    if limit is None:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    else:
        with _group(limit) as procs:
            inside = ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh", *command]
            done = subprocess.run(inside, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _bytes(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit])


@pytest.mark.full
@pytest.mark.launch
@pytest.mark.parametrize("form", ["original", "dequantized"])
def test_a_merge_stays_within_the_memory_that_it_states(cli_env, tmp_path, tiny_model, form):
    base = _write_base(tmp_path / "base", tiny_model)
    adapter, target = _write_adapter(tmp_path / "adapter", base), tmp_path / "merged"
    said = _export(cli_env, base, adapter, target, form, limit=int(0.5 * GB * 1e9) + 2 * 2**30)
    stated = re.search(r"Folding takes at most ([\d.]+ \w+) of memory, beside this process's own ([\d.]+ \w+)", said)
    assert stated, said
    limit = sum(_bytes(text) for text in stated.groups()) + SLACK
    assert limit < GB * 1e9, "the base would fit as a whole"
    _export(cli_env, base, adapter, target, form, limit)
    if form == "original":
        _compare(base, adapter, target)


def _compare(base: Path, adapter: Path, target: Path) -> None:
    """Compare some linears with the formula, W + B A alpha / r, rounded once."""
    for number in (0, LAYERS - 1):
        file, start = f"model-{number:05}.safetensors", f"base_model.model.model.layers.{number}.mlp.down_proj"
        name = f"model.layers.{number}.mlp.down_proj.weight"
        with (
            safe_open(str(base / file), "pt") as old, safe_open(str(target / file), "pt") as new,
            safe_open(str(adapter / "adapter_model.safetensors"), "pt") as factors,
        ):  # fmt: skip
            a, b = (factors.get_tensor(f"{start}.lora_{which}.weight") for which in "AB")
            wanted = (old.get_tensor(name).float() + b @ a * (8 / RANK)).bfloat16()
            assert torch.equal(new.get_tensor(name), wanted)
