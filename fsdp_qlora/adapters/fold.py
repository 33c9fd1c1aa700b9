"""Folds an adapter's folder into dense weights, one linear at a time, by PEFT's own ``merge``.

Every method that PEFT can merge is merged, in float32, by the code that defines it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from torch import nn

from fsdp_qlora.adapters.folder import WEIGHTS_NAME, opened_weights, read_adapter_config, stored_modules
from fsdp_qlora.adapters.method import build_method, of_target, scaling_of, shared_names
from fsdp_qlora.adapters.names import IN_FILE
from fsdp_qlora.adapters.peft_layers import CPU, adapted_alone, adapted_layers
from fsdp_qlora.adapters.starts import Start
from fsdp_qlora.adapters.turns import FILE_NAME, read_start
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.weights import LowRank
from fsdp_qlora.shapes.tokens import TOKEN_ROWS


class StoredAdapter:
    """A PEFT adapter folder, whose tensors are read when they are needed."""

    def __init__(self, folder: Path) -> None:
        """Read its config and the names of its tensors.

        Raises:
            ModelError: if it is no adapter folder, or one that is not supported.
            SecurityError: if its file of tensors is a link out of the folder.
        """
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.modules = stored_modules(folder, self.config)
        """Names of the linears with an adapter."""
        self._settings = self.config.settings(self.modules)
        self._method = build_method(self._settings.method)
        self._file = own_file(folder, WEIGHTS_NAME)

    @torch.no_grad()
    def fold(self, name: str, weight: torch.Tensor, sizes: Mapping[str, tuple[int, int]]) -> torch.Tensor:
        """Return the weight of linear ``name`` with its adapter folded in.

        Args:
            name: a linear with an adapter.
            weight: ``[out_features, in_features]``; it is not changed.
            sizes: name -> ``(out_features, in_features)`` of every linear with an adapter: the shared projections of
                some methods fit the largest.

        Returns:
            float32 ``[out_features, in_features]``.

        Raises:
            ModelError: if the adapter's tensors do not fit the linear, or hold values that are not finite.
        """
        first = {size: other for other, size in reversed(list(sizes.items()))}
        linears = {other: size for size, other in first.items()} | {name: sizes[name]}
        settings = of_target(self._settings, name)
        model = adapted_alone(self._method.peft(list(linears), settings, None), linears, CPU)
        tensors = self._tensors(name)
        try:
            loaded = set_peft_model_state_dict(model, tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"adapter: {self._file} does not fit {name} {list(weight.shape)}: {error}") from error
        if loaded.unexpected_keys:
            raise ModelError(f"adapter: {self._file}: PEFT does not know {loaded.unexpected_keys[0]}.")
        layer = adapted_layers(model)[IN_FILE + name]
        base: nn.Module = layer.get_base_layer()
        base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        layer.merge()
        return layer.get_base_layer().weight.detach()  # type: ignore[no-any-return]

    def taken(self, name: str) -> LowRank | None:
        """Return what its start took off the weight of a linear before that was stored; None: nothing.

        Raises:
            ModelError: if the folder lacks what it started from.
        """
        if self.config.start is None or name not in self.modules:
            return None
        return self.start_of(name).taken(self.config.start, self.scaling(name))

    def start_of(self, name: str) -> Start:
        """Return what the adapter of a linear started from.

        Raises:
            ModelError: if the folder lacks it.
        """
        return read_start(own_file(self.folder, FILE_NAME), IN_FILE + name)

    def scaling(self, name: str) -> float:
        """Return the factor of the product of LoRA's matrices of a linear."""
        return scaling_of(of_target(self._settings, name))

    def token_rows(self, table: str) -> torch.Tensor | None:
        """Return the trained rows of an embedding or head, ``[len(config.token_ids), hidden_size]``, if it has any."""
        key = f"{IN_FILE}{table}.{TOKEN_ROWS}"
        with opened_weights(self._file) as stored:
            if key not in stored.keys():  # noqa: SIM118
                return None
            rows = stored.get_tensor(key)
        require_finite(rows, f"adapter: {key} in {self._file}")
        return rows

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the file's tensors of one linear, and those of none."""
        start, shared = f"{IN_FILE}{name}.", shared_names()
        with opened_weights(self._file) as stored:
            own = [key for key in stored.keys() if key.startswith(start) or key in shared]  # noqa: SIM118
            tensors = {key: stored.get_tensor(key).float() for key in own}
        for key, value in tensors.items():
            require_finite(value, f"adapter: {key} in {self._file}")
        return tensors
