"""Private names of upstream that we use: each in one module, and here, so that a test says when one is gone.

`tools/house_rules.py` refuses a name that is not listed, or that another module uses too;
`tests/unit/test_private_names.py` looks each one up where upstream has it. Tests of what they do are named beside them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

PRIVATE: dict[str, tuple[str, str, str]] = {
    "_register_custom_module": ("adapters/lora.py", "peft.LoraConfig()", "test_lora.py"),
    "_MOE_TARGET_MODULE_MAPPING": (
        "adapters/names.py", "peft.utils.transformers_weight_conversion", "test_upstream_code.py",
    ),
    "_MODEL_TO_CONVERSION_PATTERN": ("adapters/names.py", "transformers.conversion_mapping", "test_upstream_code.py"),
    "_compatible_flash_implementations": (
        "attention/candidates.py", "transformers.PreTrainedModel", "test_hub_kernels.py",
    ),
    "_model_mapping": ("attention/candidates.py", "transformers.AutoModel", "test_attention.py"),
    "_supports_attention_backend": ("attention/candidates.py", "transformers.PreTrainedModel", "test_attention.py"),
    "_supports_flash_attn": ("attention/candidates.py", "transformers.PreTrainedModel", "test_attention.py"),
    "_supports_sdpa": ("attention/candidates.py", "transformers.PreTrainedModel", "test_attention.py"),
    "_modules": ("heads/upstream.py", "torch.nn.Module()", "test_upstream_code.py"),
    "_non_persistent_buffers_set": ("load/buffers.py", "torch.nn.Module()", "test_upstream_code.py"),
    "_keys_to_ignore_on_load_unexpected": (
        "load/inventory.py", "transformers.PreTrainedModel", "test_upstream_code.py",
    ),
    "_keys_to_ignore_on_load_missing": ("load/inventory.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_keys_to_ignore_on_save": ("load/inventory.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_keep_in_fp32_modules_strict": ("model/construct.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_keep_in_fp32_modules": ("model/construct.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_init_weights": ("model/construct.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_experts_implementation": ("model/experts.py", "transformers.LlamaConfig()", "test_formats.py"),
    "_no_split_modules": ("model/families.py", "transformers.PreTrainedModel", "test_upstream_code.py"),
    "_apply_gate": (
        "quant/experts.py", "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts", "test_formats.py",
    ),
    "torch._dynamo": ("parallel/compile.py", "torch", "test_compile.py"),
    "torch._dynamo.exc": ("parallel/compile.py", "torch", "test_compile.py"),
    "torch._inductor": ("parallel/compile.py", "torch", "test_compile.py"),
    "torch._functorch": ("parallel/compile.py", "torch", "test_compile.py"),
    "_config": ("parallel/compile.py", "torch.fx.experimental", "test_compile.py"),
    "_foreach_norm": ("optim/optimizers.py", "torch", "test_optim.py"),
    "_foreach_mul_": ("optim/optimizers.py", "torch", "test_optim.py"),
    "_cdata": ("parallel/offload.py", "torch.UntypedStorage()", "test_offload.py"),
    "_scaled_dot_product_flash_attention": ("parallel/recompute.py", "torch.ops.aten", "test_fast_paths.py"),
    "_scaled_dot_product_efficient_attention": ("parallel/recompute.py", "torch.ops.aten", "test_fast_paths.py"),
    "_scaled_dot_product_cudnn_attention": ("parallel/recompute.py", "torch.ops.aten", "test_fast_paths.py"),
    "_scaled_dot_product_flash_attention_for_cpu": ("parallel/recompute.py", "torch.ops.aten", "test_fast_paths.py"),
    "_is_mkldnn_bf16_supported": ("quant/gemm.py", "torch.ops.mkldnn", "test_products.py"),
    "_unsafe_view": ("quant/products.py", "torch.ops.aten", "test_products.py"),
}  # fmt: skip
"""Name -> the module of ours, what upstream has it on, the test of what it does."""
WHOLE_MODULES = {
    "model/live.py": "test_runs.py",
    "simulate/device.py": "test_simulated_device.py",
    "simulate/tracker.py": "test_simulate.py",
}
"""Modules that exist to hold private parts of upstream: all that they use is theirs alone."""
DOCUMENTED = {"_exit", "_replace"}
"""Public in spite of their names (`os._exit`, a named tuple's `_replace`)."""


def own_names(trees: list[ast.Module]) -> set[str]:
    """Return the private names that the package defines itself."""
    found: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name of somebody else's in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own | DOCUMENTED:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("fsdp_qlora", "__future__")):
            if any(part.startswith("_") for part in (node.module or "").split(".")):
                yield node.lineno, node.module or ""
            yield from ((node.lineno, a.name) for a in node.names if _is_private(a.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            words = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
            yield from ((node.lineno, word) for word in words if _is_private(word))


def problems(place: str, tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Yield what of upstream's private names a module uses that is not its own to use."""
    if place in WHOLE_MODULES:
        return
    for line, name in used(tree, own):
        if name not in PRIVATE:
            yield f"{line}: {name} is private to upstream and not in tools/private_names.py"
        elif PRIVATE[name][0] != place:
            yield f"{line}: {name} is private to upstream; {PRIVATE[name][0]} alone uses it"
