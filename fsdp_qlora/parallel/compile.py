"""`torch.compile` by decoder layer: one compilation serves all layers, and FSDP's hooks stay outside of it.

Compiling is expensive (some 15 s each time on a CPU), and torch gives up at the ninth. So nothing that changes from
batch to batch may ask for another one: sizes are symbols, equal ones stay independent of each other, and the first
layer's input wants a gradient like all others'. What cannot be a symbol (one row or several, a mask or none) is a
`Form` (`fsdp_qlora.data.forms`): layers are compiled for a run's usual ones and run as written for the rare rest.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fsdp_qlora.errors import typed_line

COMPILED_TYPES = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox"]
)
"""Families whose layers are known to be one graph (`tests/unit/test_compile.py`): those that ``auto`` compiles."""
COMPILATION = {"cpu": (1.2e11, 0.08, 60.0), "accelerator": (2e14, 0.12, 60.0)}
"""(operations a second of a rank, share of a step that compiled layers save, seconds that compiling takes): the CPU's
as measured in docs/performance.md, an accelerator's assumed."""
MOST_COMPILATIONS = 4
"""In a run: kinds of layers times forms of micro-batches."""


class CompiledLayers:
    """Decoder layers that run compiled, and the switch between their compiled code and their own.

    A layer that cannot be compiled runs as written and notes why: an exception in the middle of a forward would leave
    the other ranks waiting in the next gather. Between steps the ranks compare notes (`EagerFallback`).
    """

    def __init__(self, num_kinds: int) -> None:
        self.num_kinds = num_kinds
        """Kinds of layers: each form of micro-batch is compiled once for each."""
        self.failure: str | None = None
        """Why compiling failed on this rank, if it did."""
        self.micro_batch = 0
        """Counts micro-batches, so that a layer's recomputation in backward runs as its forward did."""
        self.eager = False
        """Whether this micro-batch runs the layers as written."""

    @property
    def max_forms(self) -> int:
        """Forms of micro-batches that may be compiled."""
        return max(1, MOST_COMPILATIONS // self.num_kinds)

    def begin(self, rare: bool) -> None:
        """Start a micro-batch; a ``rare`` one is not worth a compilation."""
        self.micro_batch += 1
        self.eager = rare or self.failure is not None


class _CompiledForward:
    """A layer's forward: compiled, or as written where `CompiledLayers` says so or compiling fails."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any], layers: CompiledLayers) -> None:
        self._plain, self._compiled, self._layers = plain, compiled, layers
        self._micro_batch, self._eager = -1, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers
        if self._micro_batch != layers.micro_batch:
            self._micro_batch, self._eager = layers.micro_batch, layers.eager
        if not self._eager:
            try:
                return self._compiled(*args, **kwargs)
            except _failures() as error:  # raised before anything of the layer has run
                layers.failure = layers.failure or _reason(error)
                layers.eager = self._eager = True
        return self._plain(*args, **kwargs)


def _reason(error: Exception) -> str:
    """Return what the compiler says in a line: its errors have the name of what it cannot do in a line of its own."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = next((f" {line}" for line in lines if line.startswith("Explanation:")), "")
    return f"{typed_line(error)}{more}"[:400]


def compile_layers(layers: Sequence[nn.Module], layer_types: Sequence[str] = ()) -> CompiledLayers:
    """Compile each of ``layers`` when it first runs; call it, and `want_input_gradient`, after `fully_shard`.

    `fully_shard` gives a layer another class, and a layer of transformers checkpoints its activations only where its
    forward is that of its class: compiled before, it would keep them all.

    A layer is one graph (``fullgraph``): one that breaks in parts is an error and not slow code. Layers of one kind
    share their code, whatever the number and length of the rows.

    Args:
        layers: decoder layers.
        layer_types: what the model's config says each one is (sliding or full attention), if it does.
    """
    from torch._dynamo import config as dynamo_config  # here: it imports the whole compiler
    from torch._inductor import config as inductor_config

    # FSDP2 warns that a compiled layer's output is a view; transformers' models never write into it
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    # A checkpointed layer passes products from one linear to the next (`SharedInput`); recomputation replays the graph,
    # so there is nothing to pass on
    dynamo_config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # Compiled headers would lie in the temporary folder of all users, wherever the cache is
    inductor_config.cpp_cache_precompile_headers = False
    _keep_sizes_apart()
    torch.compiler.reset()  # an earlier model's layers in this process would count against the number of recompilations
    switch = CompiledLayers(len(_kinds(layers, layer_types)))
    for layer in layers:
        plain = layer.forward
        layer.forward = _CompiledForward(plain, torch.compile(plain, fullgraph=True, dynamic=True), switch)
    return switch


def _kinds(layers: Sequence[nn.Module], layer_types: Sequence[str]) -> set[object]:
    """Return what tells layers apart that cannot share their code."""
    names = layer_types if len(layer_types) == len(layers) else [""] * len(layers)
    return {(name, *(type(m) for m in layer.modules())) for name, layer in zip(names, layers, strict=True)}


def want_input_gradient(embedding: nn.Module) -> None:
    """Let the embedding's output want a gradient, so that the first layer is compiled as all others are.

    It costs the first layer's gradient of its input, a fraction of one layer's backward, and saves a compilation. Call
    it after `fully_shard`: FSDP would take the embedding for a unit that has a backward.
    """

    def want(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    embedding.register_forward_hook(want)


def _keep_sizes_apart() -> None:
    """Set what torch has no public switch for; `tests/unit/test_compile.py` notices when either changes.

    - Sizes that are equal when a layer is compiled stay different symbols. Else a first batch of 2,048 tokens would be
      taken for the 2,048 features of a hidden state, and the next length for something new.
    - Backward is compiled with forward, so that what cannot be compiled is noticed where a layer can still run as it is
      written. By default torch waits for the first backward where sizes are symbols.
    """
    from torch._functorch import config as functorch_config
    from torch.fx.experimental import _config as symbols_config

    symbols_config.use_duck_shape = False
    functorch_config.force_non_lazy_backward_lowering = True


def _failures() -> tuple[type[Exception], ...]:
    """Return what a failed compilation raises; the second, for its part, is no kind of the first."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they were written: for evaluation and generation, whose shapes would cost compilations."""
    with torch.compiler.set_stance("force_eager"):
        yield


def can_compile(device: torch.device) -> bool:
    """Whether what `torch.compile` needs is here: a C++ compiler for a CPU, Triton for an accelerator."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return importlib.util.find_spec("triton") is not None
