"""`CausalModel`: the FSDP root module, which the training loop calls.

It runs upstream's forward up to the head, keeps the supervised positions, and asks the head for their losses. So the
full logits never exist, for any transformers causal LM, and without touching its code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from fsdp_qlora.adapters.head import AdaptedLossHead
from fsdp_qlora.adapters.lora import AdaptedModel
from fsdp_qlora.adapters.served import require_rows, use_adapter
from fsdp_qlora.adapters.turns import Starts
from fsdp_qlora.attention.flatten import decoder_inputs
from fsdp_qlora.data.labels import Sequences, supervised_positions
from fsdp_qlora.errors import ModelError
from fsdp_qlora.heads.added import TokenEmbedding
from fsdp_qlora.heads.dense import LossHead
from fsdp_qlora.heads.logprobs import CrossEntropy, cross_entropy_
from fsdp_qlora.heads.quantized import QuantLossHead, configure_loss_head
from fsdp_qlora.heads.upstream import AfterHead, head_input
from fsdp_qlora.parallel.compile import CompiledLayers, uncompiled
from fsdp_qlora.parallel.shard import release_gathered


class CausalModel(nn.Module):
    """A transformers causal LM (plain or with PEFT adapters) whose forward returns token losses."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self.compiled_layers: CompiledLayers | None = None
        """State of the compiled decoder layers (`compile_layers`); None if they are not compiled."""
        self.starts = Starts()
        """What the adapters started from, if that was the base weights."""
        self.fused = ""
        """What ``train.kernels`` computes in this model, in words; empty if all of it is upstream's."""

    @property
    def compiled(self) -> bool:
        """Whether the decoder layers run compiled in training."""
        return self.compiled_layers is not None and self.compiled_layers.failure is None

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model under the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def peft(self) -> PeftModel | None:
        """PEFT's model around the transformers model, if there are adapters."""
        return self.model if isinstance(self.model, PeftModel) else None

    @property
    def device(self) -> torch.device:
        """The device it computes on; its shards may be in host memory."""
        parameter = next(self.parameters())
        return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device

    def num_ids(self, without: int) -> int:
        """Return the number of token ids if tokens were added, else ``without``."""
        table = self.base.get_input_embeddings()
        return table.num_embeddings if isinstance(table, TokenEmbedding) else without

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None,
        supervised: torch.Tensor | None = None, sequences: Sequences | None = None, rare: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Return the float32 losses ``[targets]`` of the supervised tokens, in row-major order.

        Args:
            input_ids: int64 ``[rows, length]``, padded on the right (causal attention then needs no mask).
            labels: int64 ``[rows, length]``, the token itself if it is supervised, else -100.
            position_ids: int64 ``[rows, length]``, restarting where a packed row begins; transformers' attention masks
                then keep the rows apart. None if each sequence is one row.
            supervised: `supervised_positions` of the labels; None finds them here, which synchronises the device.
            sequences: for varlen attention, which takes one flat row: where each row in it begins and ends.
            rare: whether to run compiled layers eagerly: the form of this micro-batch is not worth a compilation.
        """
        base = self.base
        inputs = decoder_inputs(input_ids, position_ids, sequences)
        if self.compiled_layers is not None:
            self.compiled_layers.begin(rare)
        with nullcontext() if self.training and torch.is_grad_enabled() else self._without_backward():
            hidden = head_input(base, **inputs)
        if supervised is None:
            supervised = supervised_positions(labels)
        head = base.get_output_embeddings()
        assert head is not None
        targets = labels.flatten().index_select(0, supervised + 1)
        return head(hidden.flatten(0, 1).index_select(0, supervised), labels=targets)

    def losses(self, labels: torch.Tensor, supervised: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return the float32 losses ``[targets]`` of an encoder-decoder's supervised tokens, in row-major order.

        Upstream's own forward shifts the labels, runs encoder and decoder, and is stopped at the head. Under FSDP, a
        collective.

        Args:
            labels: int64 ``[rows, length]``, -100 where not learned.
            supervised: int64 ``[targets]``, where the others are in the flattened labels.
            inputs: what the encoder reads.
        """
        base = self.base
        hidden = head_input(base, **self._cast(inputs), labels=labels, use_cache=False).flatten(0, 1)
        head = base.get_output_embeddings()
        assert head is not None
        return head(hidden.index_select(0, supervised), labels=labels.flatten().index_select(0, supervised))

    def use_adapter(self, name: str | None) -> None:
        """Compute with the adapter ``name`` from now on; None: with the base alone.

        What is trained does not change. Every rank must call it.

        Raises:
            ModelError: if there is no such adapter.
        """
        use_adapter(self._adapted(), name)

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None,
        adapter_names: Sequence[str] | None = None, last: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Return the logits ``[rows, length, vocab]`` (for checks; training never materialises them in full).

        With ``last``, only those of so many last positions, ``[rows, last, vocab]``.
        ``adapter_names`` names an adapter for each row, or ``__base__`` for the base alone; None: the one in use for
        all rows. Backward is not supported: a sharded head is not gathered for it.

        Raises:
            ModelError: if the rows cannot be computed so.
        """
        more: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if adapter_names is not None:
            require_rows(self._adapted(), adapter_names, len(input_ids))
            more["adapter_names"] = list(adapter_names)
        if last and "logits_to_keep" in signature(self.base.forward).parameters:
            more["logits_to_keep"] = last
        with self._without_backward():
            return self.model(input_ids=input_ids, use_cache=False, **more).logits[:, -last:]

    def outputs(self, **inputs: Any) -> Any:
        """Return the transformers model's own outputs, as encoder-decoders and masked language models need."""
        return self.model(**self._cast(inputs))

    def generate(self, **settings: Any) -> torch.Tensor:
        """Generate as transformers does. Under FSDP, a collective.

        A ``generation_config`` that is given says everything: what it leaves unset has transformers' defaults, and not
        what the model's own says, which may stem from old settings in config.json.

        ``adapter_names`` names an adapter for each row, as in `logits`.

        Raises:
            ModelError: if the rows cannot be computed so.
        """
        if (names := settings.get("adapter_names")) is not None:
            require_rows(self._adapted(), names)
        base, own = self.base, self.base.generation_config
        if "generation_config" in settings:
            base.generation_config = GenerationConfig()
        try:
            with self._inputs_on(self.device), self._without_backward():
                return self.model.generate(**self._cast(settings))  # type: ignore[operator]
        finally:
            base.generation_config = own

    def _cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs with those that are no tokens (pixels, spectrograms) in the model's dtype."""
        dtype = self.base.dtype
        floats = {n: x.to(dtype) for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return inputs | floats

    def _adapted(self) -> AdaptedModel:
        if self.peft is None:
            raise ModelError("adapter_names: this model has no adapters.")
        return self.peft

    @contextmanager
    def _without_backward(self) -> Iterator[None]:
        """Run a forward without a backward: layers run eagerly, and none stays gathered afterwards."""
        try:
            with uncompiled() if self.compiled_layers else nullcontext():  # importing the compiler takes seconds
                yield
        finally:
            release_gathered(self)

    @contextmanager
    def _inputs_on(self, device: torch.device) -> Iterator[None]:
        """Send the model's inputs to ``device``: transformers sends them to the device of the first parameter.

        With offloaded parameters that is the host, and it warns about it.
        """

        def send(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

        handle = self.base.register_forward_pre_hook(send, with_kwargs=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="You are calling .generate.* device type different")
                yield
        finally:
            handle.remove()


def install_loss_head(
    model: PreTrainedModel, after: AfterHead, chunk: int, cross_entropy: CrossEntropy = cross_entropy_
) -> bool:
    """Replace the output head with a `LossHead` that shares its weight; a 4-bit head is already a loss head.

    ``after`` is what `after_head` found while the head was still upstream's own. Returns whether ``cross_entropy``
    computes the losses: a quantized head works by slices of the vocabulary, and upstream's code after a head needs
    autograd.
    """
    head = model.get_output_embeddings()
    if isinstance(head, QuantLossHead):
        configure_loss_head(head, after, chunk)
        return False
    if isinstance(head, lora.Linear):
        AdaptedLossHead.around(head, LossHead.from_linear(head.get_base_layer(), after, chunk, cross_entropy))  # type: ignore[arg-type]
        return after.code is None
    assert isinstance(head, nn.Linear)
    model.set_output_embeddings(LossHead.from_linear(head, after, chunk, cross_entropy))
    return after.code is None
