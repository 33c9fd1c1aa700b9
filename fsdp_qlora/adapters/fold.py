"""Folds an adapter's folder into dense weights, one linear at a time, by PEFT's own ``merge``.

Every method that PEFT can merge is merged, in float32, by the code that defines it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fsdp_qlora.adapters.folder import (
    WEIGHTS_NAME,
    opened_weights,
    read_adapter_config,
    require_shapes,
    stored_modules,
)
from fsdp_qlora.adapters.method import build_method, of_target, scaling_of, shared_names, spelt_out
from fsdp_qlora.adapters.names import IN_FILE
from fsdp_qlora.adapters.peft_layers import CPU, META, adapted_alone, adapted_layers
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

    def require_fits(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Check that the file has the tensors that PEFT's own layers have on such linears, and no others.

        ``sizes`` are as for `fold`: of every linear with an adapter.

        Raises:
            ModelError: naming the first tensor that is missing, that PEFT would pass over, or that has another shape.
        """
        wanted = self._of_peft(sizes)
        with opened_weights(self._file) as stored:
            stored.require_equal_copies()
            names = [name for name in stored.keys() if not name.endswith(TOKEN_ROWS)]  # noqa: SIM118
            shapes = {name: stored.get_slice(name).get_shape() for name in names}
        for odd, what in (
            (wanted.keys() - shapes.keys(), "lacks {} tensor(s) that PEFT has with its settings"),
            (shapes.keys() - wanted.keys(), "holds {} tensor(s) that PEFT passes over with its settings"),
        ):
            if odd:
                raise ModelError(
                    f"adapter: {self._file} {what.format(len(odd))} (first: {min(odd)}); the file is not whole, or "
                    "its config is of another adapter."
                )
        require_shapes(self._file, wanted, shapes)

    def _of_peft(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that PEFT saves of adapters on such linears, without copies of shared ones.

        Raises:
            ModelError: if PEFT refuses the settings for these linears.
        """
        names = list(sizes)
        try:
            config = self._method.peft(names, spelt_out(self._settings, names), None)
            alone = adapted_alone(config, sizes, META)
            state = get_peft_model_state_dict(alone, save_embedding_layers=False)
        except (ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
            raise ModelError(f"adapter: {self.folder} does not fit this base model: {error}") from error
        shared = shared_names()
        ends = tuple(f".{name.rpartition('.')[2]}" for name in shared)
        return {n: tuple(value.shape) for n, value in state.items() if n in shared or not n.endswith(ends)}

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
