"""The processes that `benchmarks.loading` starts: one that makes the model, and the ranks that load it."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (else it would be imported while loading)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.loading import FILE_BYTES, SHAPE
from fsdp_qlora.cli.quiet import quieten
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.distributed.mesh import Ranks, build_ranks
from fsdp_qlora.distributed.process import Placement, process_group, set_threads
from fsdp_qlora.distributed.reduce import barrier
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import stream_weights
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.run.build import build_sharded


def make_model(folder: Path) -> None:
    """Write the model that is loaded."""
    write_random(folder, LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], dtype="bfloat16"))


def write_random(folder: Path, config: LlamaConfig) -> None:
    """Write a random model file by file, so that no more than one file is in memory."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, part, size, weight_map = torch.Generator(device).manual_seed(0), {}, 0, {}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    num_files = 0
    for left, (name, shape) in zip(range(len(shapes) - 1, -1, -1), shapes.items(), strict=True):
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)
        part[name] = drawn.cpu()
        size += 2 * shape.numel()
        following = 2 * list(shapes.values())[-left].numel() if left else FILE_BYTES
        if size + following > FILE_BYTES:
            num_files += 1
            file = f"model-{num_files:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            part, size = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def be_rank(way: str, folder: Path) -> dict[str, Any]:
    """Load in one way as one rank of several; return seconds, growth and, of ours, the bytes read and planned."""
    quieten()
    placement, cpu = Placement.from_env(), torch.device("cpu")
    set_threads(0, placement.local_world_size)
    with process_group(cpu, placement, 600) as group:
        ranks = build_ranks(group, cpu)
        barrier(ranks)
        baseline, started = _resident(), time.perf_counter()
        model, found = WAYS[way](folder, ranks)
        found |= {"seconds": time.perf_counter() - started, "baseline": baseline}
        found["growth"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
        del model
    return found


def _ours(folder: Path, ranks: Ranks) -> tuple[Any, dict[str, Any]]:
    config = from_dict({"model": {"name": str(folder), "attn_implementation": "eager"}})
    base = build_skeleton(folder, torch.bfloat16, "eager")
    shapes = read_shapes(base)
    plan = make_plan(config, shapes, ranks.size)
    model = build_sharded(config, base, shapes, plan, ranks)
    report = stream_weights(model, model.base, SafetensorsFolder(folder), ranks)
    planned = plan.bytes.base_packed + plan.bytes.base_statistics + plan.bytes.base_kept
    return model, {"read": report.bytes_read, "files": report.file_bytes, "planned": planned}


def _theirs(folder: Path, _: Ranks) -> tuple[Any, dict[str, Any]]:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    return model, {}


WAYS = {"ours": _ours, "peer": _theirs}


def main() -> None:
    """Be what the first argument says, on the model in the folder of the second."""
    way, folder = sys.argv[1], Path(sys.argv[2])
    if way == "maker":
        make_model(folder)
    else:
        print(json.dumps(be_rank(way, folder)), flush=True)


if __name__ == "__main__":
    main()
