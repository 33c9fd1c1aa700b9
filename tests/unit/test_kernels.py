"""`train.kernels`: which modules other code may compute, that it computes the same, and what is refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fsdp_qlora.checks.results import twin_key
from fsdp_qlora.config.choices import Table
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.config.train_settings import KernelsName
from fsdp_qlora.errors import PlanError
from fsdp_qlora.heads.logprobs import cross_entropy_
from fsdp_qlora.model import liger
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.formulas import (
    gelu_product,
    gelu_tanh_product,
    norm_formula,
    one_plus_weight,
    product_formula,
    scaled_after_cast,
    scaled_before_cast,
    silu_product,
)
from fsdp_qlora.model.fused import FusedMLP, FusedNorm, fusible, swap_fused
from fsdp_qlora.model.kernels import KERNELS, Kernels, LigerKernels, kernels_to_compile
from fsdp_qlora.model.skeleton import build_skeleton
from fsdp_qlora.parallel import compile as compile_module
from fsdp_qlora.parallel.compile import waiting_for_compiler
from fsdp_qlora.plan.compilation import Work, choose_compilation
from fsdp_qlora.run.decide import plan_for, require_kernels
from tests.families import write_family

ROOT = Path(__file__).resolve().parents[2]
CPU, FP32 = torch.device("cpu"), torch.float32
NORMS = {
    "llama.LlamaRMSNorm": scaled_after_cast,
    "mistral.MistralRMSNorm": scaled_after_cast,
    "qwen3.Qwen3RMSNorm": scaled_after_cast,
    "deepseek_v3.DeepseekV3RMSNorm": scaled_after_cast,
    "olmo2.Olmo2RMSNorm": scaled_before_cast,
    "gpt_oss.GptOssRMSNorm": scaled_before_cast,
    "gemma.GemmaRMSNorm": one_plus_weight,
    "gemma2.Gemma2RMSNorm": one_plus_weight,
    "gemma3.Gemma3RMSNorm": one_plus_weight,
}
MLPS = ("llama.LlamaMLP", "qwen2.Qwen2MLP", "qwen3.Qwen3MLP", "gemma2.Gemma2MLP", "gemma3.Gemma3MLP")
ACTIVATIONS = {
    "silu": silu_product, "swish": silu_product, "gelu_pytorch_tanh": gelu_tanh_product, "gelu": gelu_product,
}  # fmt: skip


def _class(name: str) -> type[nn.Module]:
    family, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), kind)


def _mlp(kind: type[nn.Module], activation: str) -> nn.Module:
    settings = {"hidden_size": 8, "intermediate_size": 24, "hidden_act": activation, "mlp_bias": False}
    config = type("Config", (), settings | {"hidden_activation": activation})
    return kind(config)


def _fuse(module: nn.Module, kernels: Kernels) -> nn.Module:
    """Return what replaces a module that stands alone."""
    dtype = next(module.parameters()).dtype
    return fusible(nn.ModuleDict({"only": module}), kernels, dtype).modules["only"]


class _Plain(Kernels):
    """The formulas themselves."""

    def code(self, formula):
        return formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_upstream_computes_its_formula_bit_for_bit(name, dtype):
    norm = _class(name)(32, 1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    formula, eps = norm_formula(norm)
    assert formula is NORMS[name] and eps == 1e-5
    mine = _fuse(norm, _Plain())
    assert isinstance(mine, FusedNorm) and mine.weight is norm.weight and [*mine.state_dict()] == [*norm.state_dict()]
    assert mine(x).equal(norm(x)) and mine(x).dtype == norm(x).dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", MLPS)
def test_a_gated_mlp_of_upstream_computes_its_formula_bit_for_bit(name, activation):
    mlp = _mlp(_class(name), activation).bfloat16()
    assert product_formula(mlp) is ACTIVATIONS[activation]
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine = _fuse(mlp, _Plain())
    assert isinstance(mine, FusedMLP) and [*mine.state_dict()] == [*mlp.state_dict()]
    assert all(a is b for a, b in zip(mine.parameters(), mlp.parameters(), strict=True))
    assert mine(x).equal(mlp(x))


def test_what_computes_something_else_is_left_alone():
    llama, gemma = _class("llama.LlamaRMSNorm"), _class("gemma.GemmaRMSNorm")

    class OtherForward(llama):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class OtherNorm(gemma):
        def _norm(self, x):
            return x

    class WithBias(llama):
        def __init__(self):
            super().__init__(8)
            self.bias = nn.Parameter(torch.zeros(8))

    for module in (OtherForward(8), OtherNorm(8), WithBias(), T5LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)):
        assert norm_formula(module) is None, type(module)
    for activation in ("gelu_new", "gelu_python", "gelu_python_tanh", "relu2", "prelu"):
        assert product_formula(_mlp(_class("llama.LlamaMLP"), activation)) is None, activation

    class Scaled(_class("llama.LlamaMLP")):
        def forward(self, x):
            return 0.5 * super().forward(x)

    assert product_formula(_mlp(Scaled, "silu")) is None


def _skeleton(tmp_path, family, dtype=torch.float32):
    return build_skeleton(write_family(tmp_path / family, family), dtype, "eager")


def test_torch_replaces_nothing_and_the_others_what_they_can(tmp_path):
    base = _skeleton(tmp_path, "qwen3")
    modules = dict(base.named_modules())
    assert fusible(base, LigerKernels(), FP32).describe(loss=True) == "9 norms, 2 MLPs, the loss"
    assert fusible(base, LigerKernels(), FP32).describe(loss=False).endswith("MLPs; left as they are: the loss")
    assert not fusible(base, Kernels(), FP32).modules and Kernels().cross_entropy is cross_entropy_
    fused = fusible(
        base, LigerKernels(), FP32
    )  # before each layer's attention and MLP, on queries and keys; the last one
    assert fused.describe() == "9 norms, 2 MLPs"
    keys, parameters = [*base.state_dict()], [*base.parameters()]
    swap_fused(base, fused)
    assert [*base.state_dict()] == keys
    assert all(a is b for a, b in zip(base.parameters(), parameters, strict=True))
    left = [name for name, module in base.named_modules() if modules.get(name) is not module]
    assert sorted(left) == sorted(fused.modules)


def test_layers_that_are_compiled_whole_keep_their_modules(tmp_path):
    base = _skeleton(tmp_path, "llama")
    assert fusible(base, _Plain(), FP32, base.model.layers).describe() == "1 norm"


def test_norms_in_another_dtype_than_the_model_are_left_to_upstream(tmp_path):
    base = _skeleton(tmp_path, "llama", torch.bfloat16)
    base.model.norm.to(FP32)
    fused = fusible(base, LigerKernels(), torch.bfloat16)
    assert "model.norm" not in fused.modules and fused.describe().endswith("left as they are: 1 LlamaRMSNorm")


def test_names_match():
    assert set(typing.get_args(KernelsName)) == {"auto", *KERNELS} and isinstance(KERNELS, Table)
    assert all(kind().name == name for name, kind in KERNELS.items())


def _config(kernels: str, **groups) -> RunConfig:
    groups = {"precision": {"name": "fp32"}, **groups}
    groups["train"] = {"kernels": kernels, **groups.get("train", {})}
    return from_dict({"model": {"name": "meta-llama/Llama-3.2-1B"}, **groups})


def test_auto_takes_upstreams_modules_and_says_why():
    plan = plan_for(_config("auto", plan={"device": "h100"}), 1)
    assert str(plan.choices["train.kernels"]) == "torch (no kernels have been measured on this device)"
    plan = plan_for(_config("liger", plan={"device": "h100"}), 1)  # another machine's libraries
    assert str(plan.choices["train.kernels"]) == "liger (as asked)"


def test_impossible_kernels_are_refused_before_anything_is_built():
    (said,) = failures(_config("liger", train={"compile": "true"}))
    assert said.startswith("train.kernels: compiled layers")
    (said,) = failures(_config("liger", launcher={"device": "cpu"}))
    assert said.startswith("train.kernels: Liger's kernels need a GPU")
    assert not failures(_config("compile", train={"compile": "true"}))


def test_kernels_that_cannot_run_here_are_refused(tmp_path, monkeypatch):
    llama, neox = _skeleton(tmp_path, "llama"), _skeleton(tmp_path, "gpt_neox")

    def refusal(kernels, base, device):
        with pytest.raises(PlanError) as refused:
            require_kernels(_config(kernels), base, device)
        assert refused.value.exit_code == 2
        return str(refused.value)

    cuda = torch.device("cuda", 0)
    for name in KERNELS:
        require_kernels(_config(name), llama, None)
    require_kernels(_config("torch"), neox, CPU)
    assert "liger needs a GPU" in refusal("liger", llama, CPU)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert "liger needs liger-kernel and triton, not installed here" in refusal("liger", llama, cuda)
    assert "compile needs Triton" in refusal("compile", llama, cuda)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    require_kernels(_config("liger"), llama, cuda)
    none = refusal("liger", neox, cuda)
    assert "no kernel for any module of this model (no module; left as they are: " in none
    assert "LayerNorm" in none and "GPTNeoXMLP" in none
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: None)
    assert "compile needs a C++ compiler" in refusal("compile", llama, CPU)


def test_a_compilation_is_announced():
    said = kernels_to_compile("compile", CPU)
    assert said is not None and said.startswith("train.kernels=compile: each rank compiles norms, gated activations")
    assert "some 20 s" in said and kernels_to_compile("torch", CPU) is kernels_to_compile("auto", CPU) is None
    assert "the decoder layers when they first run" in waiting_for_compiler("the decoder layers", torch.device("cuda"))


def test_liger_leaves_the_layers_uncompiled():
    choice = choose_compilation(_config("liger"), Work(8, 10**6, 10**9), 10**6, "cuda", True)
    assert not choice.on and choice.why == "train.kernels=liger"


def test_a_remembered_check_knows_the_kernels(tmp_path):
    model_config = load_config(write_family(tmp_path / "llama", "llama"))
    keys = {twin_key(_config(name), model_config, [], ["eager"], CPU, 1) for name in ("torch", "compile", "liger")}
    assert len(keys) == 3


_STAND_IN = '''
"""Stands in for Liger's functions in plain torch; backward overwrites what the real one overwrites."""
import torch
import torch.nn.functional as F

class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        ctx.save_for_backward(X, W)
        ctx.rest = eps, offset, casting_mode, in_place
        return LigerRMSNormFunction.of(X, W, eps, offset, casting_mode)
    @staticmethod
    def of(X, W, eps, offset, casting_mode):
        values = X.float() * torch.rsqrt(X.float().pow(2).mean(-1, keepdim=True) + eps)
        if casting_mode == "llama":
            return values.to(X.dtype) * (W + offset)
        return (values * (W.float() + offset)).to(X.dtype)
    @staticmethod
    def backward(ctx, dY):
        X, W = ctx.saved_tensors
        with torch.enable_grad():
            x = X.detach().requires_grad_()
            dX, = torch.autograd.grad(LigerRMSNormFunction.of(x, W, *ctx.rest[:3]), x, dY)
        return (dY.copy_(dX) if ctx.rest[3] else dX), *[None] * 6

class _Product(torch.autograd.Function):
    @staticmethod
    def backward(ctx, dc):
        (a, b), act = ctx.saved_tensors, ctx.act
        with torch.enable_grad():
            x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
            da, db = torch.autograd.grad(act(x) * y, (x, y), dc)
        with torch.no_grad():
            return a.data.copy_(da), b.data.copy_(db)

class LigerSiLUMulFunction(_Product):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        ctx.act = F.silu
        return F.silu(a) * b

class LigerGELUMulFunction(_Product):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        ctx.act = lambda x: F.gelu(x, approximate="tanh")
        return ctx.act(a) * b
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package called `liger_kernel` in plain torch."""
    assert "liger_kernel" not in sys.modules
    package = tmp_path / "site/liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(_STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]


@pytest.mark.parametrize("formula", liger.CODE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_functions_are_called_as_the_formulas_are(stand_in, formula, dtype):
    """Offsets and rounding of the norms, the order of gate and up; and nothing that is read later is overwritten."""
    product = formula in (silu_product, gelu_tanh_product)
    results = []
    for code in (formula, liger.CODE[formula]):
        torch.manual_seed(0)
        x, y = torch.randn(7, 24), torch.randn(7, 24)
        inputs = [x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()]
        weight = torch.randn(24).to(dtype)
        out = code(inputs[0] * 1, inputs[1] * 1) if product else code(inputs[0], weight, 1e-5) + inputs[0]
        out.float().square().sum().backward()
        results.append((out, *(each.grad for each in inputs if each.grad is not None)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * a.norm()


LIGER_SITE = os.environ.get("FSDP_QLORA_TEST_LIGER")
_INTERPRETED = """
import sys, torch
sys.path += sys.argv[1:]
from fsdp_qlora.heads.logprobs import cross_entropy_
from fsdp_qlora.model import liger
if missing := liger.missing_packages():
    print("not installed:", *missing)
    sys.exit(77)
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for rows, vocab in ((5, 1000), (1, 32), (3, 40000)):
        for scale in (1.0, 0.25):
            for wants_grad in (True, False):
                logits = (4 * torch.randn(rows, vocab)).to(dtype)
                targets = torch.randint(0, vocab, (rows,))
                mine, theirs = logits.clone(), logits.clone()
                wanted = cross_entropy_(mine, targets, scale, None, wants_grad)
                losses = liger.cross_entropy_(theirs, targets, scale, None, wants_grad)
                assert losses.dtype == torch.float32
                torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(theirs, mine, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
                assert wants_grad or theirs.equal(logits)
"""


@pytest.mark.full
def test_ligers_own_loss_kernel_gives_our_losses_and_gradients():
    """In Triton's interpreter on a CPU. It cannot run Liger's norms and products: see tests/gpu/test_kernels.py."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _INTERPRETED, *filter(None, [LIGER_SITE])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode == 77:
        pytest.skip(f"{done.stdout.strip()}; FSDP_QLORA_TEST_LIGER may name a folder that holds them (CONTRIBUTING.md)")
    assert done.returncode == 0, done.stderr[-2000:]
