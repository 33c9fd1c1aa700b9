"""`torch.compile` per decoder layer: layers of one kind share a compilation, and FSDP's hooks stay outside it.

Compiling is expensive (about 15 s each time on a CPU), and torch gives up at the ninth compilation. So nothing that
varies between batches may trigger another one: sizes are symbols, equal sizes stay independent symbols, and the first
layer's input requires a gradient like all others'. What cannot be symbolic (one row or several, a mask or none) is a
`Form` (`fsdp_qlora.data.forms`): layers are compiled for a run's usual forms and run uncompiled for rare ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from fsdp_qlora.errors import ConfigError, typed_line
from fsdp_qlora.files.own_source import own_source

COMPILED_TYPES = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox"]
)
"""Families whose layers are known to compile to one graph (`tests/unit/test_compile.py`); ``auto`` compiles these."""
COMPILATION = {"cpu": (1.2e11, 0.3, 20.0), "accelerator": (2e14, 0.12, 60.0)}
"""(operations per second of a rank, share of a step that compiled layers save, seconds to compile). The CPU's are
measured (docs/performance.md), the accelerator's assumed."""
ARGUMENTS = r"L\['(?!self'\])"
"""What varies between calls of a layer, by dynamo's names: its arguments.

``dynamic=True`` would also make symbols of the integers in modules that FSDP manages, such as widths and head sizes.
On a CPU, compiling then takes 30 s instead of 21 (6 instead of 2 from the cache), and a step 1.5 times as long.
"""
MOST_COMPILATIONS = 4
"""Most compilations in a run: kinds of layers times forms of micro-batches."""


class CompiledLayers:
    """State shared by compiled decoder layers: whether they run compiled or eagerly.

    A layer that fails to compile runs eagerly and records why: an exception in the middle of a forward would leave the
    other ranks waiting in the next gather. Between steps the ranks compare their records (`EagerFallback`).
    """

    def __init__(self, num_kinds: int) -> None:
        self.num_kinds = num_kinds
        """Kinds of layers; each form of micro-batch is compiled once per kind."""
        self.failure: str | None = None
        """Why compiling failed on this rank, if it did."""
        self.micro_batch = 0
        """Number of the current micro-batch, so that recomputation in backward runs the same code as forward did."""
        self.eager = False
        """Whether this micro-batch runs the layers eagerly."""

    @property
    def max_forms(self) -> int:
        """Most forms of micro-batches that may be compiled."""
        return max(1, MOST_COMPILATIONS // self.num_kinds)

    def begin(self, rare: bool) -> None:
        """Start a micro-batch; a ``rare`` one is not worth a compilation."""
        self.micro_batch += 1
        self.eager = rare or self.failure is not None


class _CompiledForward:
    """A layer's forward: compiled, or eager if `CompiledLayers` says so or compiling fails."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any], layers: CompiledLayers) -> None:
        self._plain, self._compiled, self._layers = plain, compiled, layers
        self._micro_batch, self._eager = -1, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers
        if self._micro_batch != layers.micro_batch:
            self._micro_batch, self._eager = layers.micro_batch, layers.eager
        if not self._eager:
            try:
                with _arguments_vary():
                    return self._compiled(*args, **kwargs)
            except _failures() as error:  # raised before any of the layer has run
                layers.failure = layers.failure or _reason(error)
                layers.eager = self._eager = True
        return self._plain(*args, **kwargs)


def _arguments_vary() -> AbstractContextManager[None]:
    """Make symbols of `ARGUMENTS`; only around our own calls, because it overrules everybody's ``dynamic``."""
    return torch.compiler.config.patch(dynamic_sources=ARGUMENTS)  # type: ignore[attr-defined]


def _reason(error: Exception) -> str:
    """Return the compiler's error in one line; the unsupported construct is on a separate "Explanation:" line."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = next((f" {line}" for line in lines if line.startswith("Explanation:")), "")
    return f"{typed_line(error)}{more}"[:400]


def compile_layers(layers: Sequence[nn.Module], layer_types: Sequence[str] = ()) -> CompiledLayers:
    """Compile each of ``layers`` when it first runs; call this, and `want_input_gradient`, after `fully_shard`.

    `fully_shard` changes a layer's class, and a layer of transformers checkpoints its activations only if its forward
    is that of its class: if it were compiled first, it would keep them all.

    Each layer must be one graph (``fullgraph``): a graph break is an error instead of slow code. Layers of one kind
    share their code, whatever the number and length of the rows.

    Args:
        layers: decoder layers.
        layer_types: the type of each layer (sliding or full attention), if the model's config lists them.
    """
    # FSDP2 warns that a compiled layer's output is a view; transformers' models never write into it
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    settle_compiler()
    switch = CompiledLayers(len(_kinds(layers, layer_types)))
    for layer in layers:
        plain = layer.forward
        layer.forward = _CompiledForward(plain, torch.compile(plain, fullgraph=True), switch)
    return switch


def _kinds(layers: Sequence[nn.Module], layer_types: Sequence[str]) -> set[object]:
    """Return the distinct kinds of layers: layers of different kinds cannot share compiled code."""
    names = layer_types if len(layer_types) == len(layers) else [""] * len(layers)
    return {(name, *(type(m) for m in layer.modules())) for name, layer in zip(names, layers, strict=True)}


def want_input_gradient(embedding: nn.Module) -> None:
    """Make the embedding's output require a gradient, so that the first layer is compiled like all others.

    This costs the gradient of the first layer's input, a fraction of one layer's backward, and saves a compilation.
    Call it after `fully_shard`, or FSDP would treat the embedding as a unit that has a backward.
    """

    def want(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    embedding.register_forward_hook(want)


class CompiledRegion:
    """A function of tensors that runs compiled, in one graph, whatever their first dimension."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        """Compile ``plain`` when it is first called; call `settle_compiler` before the first region of a model."""
        self.plain = plain
        self._compiled = torch.compile(plain, fullgraph=True, dynamic=True)

    def __call__(self, *args: Any) -> Any:
        """Return ``plain(*args)``.

        Raises:
            ConfigError: if it cannot be compiled.
        """
        try:
            return self._compiled(*args)
        except _failures() as error:
            raise ConfigError(f"train.kernels: cannot be compiled here ({_reason(error)}). Set it to torch.") from error


def waiting_for_compiler(what: str, device: torch.device) -> str:
    """Return a line to show before ``what`` is compiled: nothing else appears until that is done."""
    seconds = COMPILATION["cpu" if device.type == "cpu" else "accelerator"][-1]
    return (
        f"each rank compiles {what} when they first run, and is quiet meanwhile: some {seconds:.0f} s if the cores are "
        "idle, and a few seconds where an earlier run has compiled them."
    )


def settle_compiler() -> None:
    """Set the compiler's options, and forget what it compiled for an earlier model in this process."""
    from torch._dynamo import config as dynamo_config  # here: it imports the whole compiler
    from torch._inductor import config as inductor_config

    # A checkpointed layer passes products from one linear to the next (`SharedInput`); recomputation replays the graph,
    # so there is nothing to pass on
    dynamo_config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # Precompiled headers would go to a temporary folder shared by all users, wherever the cache is
    inductor_config.cpp_cache_precompile_headers = False
    # torch's key of compiled code does not see what our ops say about their results
    torch.compiler.config.cache_key_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "") + own_source()
    # A float, such as an adapter's scaling, is a constant; as a symbol it would become one by tracing a second time
    dynamo_config.specialize_float = True
    _set_private_options()
    torch.compiler.reset()  # its compilations would count against the number of recompilations


def _set_private_options() -> None:
    """Set three private torch options that have no public switch; `tests/unit/test_compile.py` fails if one changes.

    - A compiled layer is taken from the cache although it holds an `autograd.Function`, ours.
    - Sizes that happen to be equal at compile time stay different symbols. Otherwise a first batch of 2,048 tokens
      would be identified with the 2,048 features of a hidden state, and the next length would trigger a recompilation.
    - Backward is compiled together with forward, so that a failure surfaces while the layer can still run eagerly. By
      default, torch delays it until the first backward if sizes are symbols.
    """
    from torch._functorch import config as functorch_config
    from torch.fx.experimental import _config as symbols_config

    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    symbols_config.use_duck_shape = False
    functorch_config.force_non_lazy_backward_lowering = True


def _failures() -> tuple[type[Exception], ...]:
    """Return what a failed compilation raises; the second class is not a subclass of the first."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers eagerly: for evaluation and generation, whose shapes would trigger compilations."""
    with torch.compiler.set_stance("force_eager"):
        yield


TRITON_CAPABILITY = (7, 0)
"""The lowest compute capability that Triton supports."""


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs here.

    That is a C++ compiler for a CPU. For an accelerator it is Triton, which needs a C compiler and, on NVIDIA's cards,
    compute capability 7.0.
    """
    if device.type == "cpu":
        return _has_one_of(os.environ.get("CXX"), "g++", "clang++")
    if importlib.util.find_spec("triton") is None or not _has_one_of(os.environ.get("CC"), "gcc", "clang", "cc"):
        return False
    capability = getattr(torch.get_device_module(device), "get_device_capability", None)
    level = capability(device) if capability is not None else None
    return not isinstance(level, tuple) or level >= TRITON_CAPABILITY  # others describe themselves in other ways


def _has_one_of(*compilers: str | None) -> bool:
    return any(shutil.which(name) for name in compilers if name)
