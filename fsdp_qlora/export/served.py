"""A base in 4 bits and an adapter in one folder, which `transformers serve` and plain ``from_pretrained`` take.

transformers loads an adapter that lies beside a model's config.json on that model, whatever base the adapter names
(``maybe_load_adapters`` in transformers' integrations/peft.py). What a server cannot ask the adapter for is written
into the model's files: the tokenizer, and where an answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, opened_weights
from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.adapter import write_weights
from fsdp_qlora.export.model_folder import SERVED, keep_template, of_tokenizer
from fsdp_qlora.export.starts import restarted
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.write import copy_regular, write_json
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.model.config import GENERATION

SERVED_METHODS = ("lora", "rslora")
"""The methods that transformers loads beside a model: it leaves DoRA's magnitudes out without an error, and PEFT has no
layers of most others for bitsandbytes' 4-bit linears."""


def require_servable(adapter: StoredAdapter) -> None:
    """Check that transformers can put an adapter on a base in 4 bits.

    Raises:
        ModelError: saying why not, and what serves it.
    """
    config = adapter.config
    why = ""
    if config.token_ids:
        why = "has rows of added tokens, for which the base has none"
    elif config.modules or config.biases:
        why = "trained weights of the base, which the base in 4 bits does not have"
    elif config.parameters:
        why = "adapts stacked weights of experts, which bitsandbytes does not store in 4 bits"
    elif config.variant not in SERVED_METHODS:
        why = f"is {config.variant}, which transformers does not load beside a base in 4 bits"
    if why:
        raise ModelError(f"what=served: {adapter.folder} {why}; what=merged makes a model that can be served.")


def require_fits(adapter: StoredAdapter, base: PreTrainedModel) -> None:
    """Check with PEFT's own code that the adapter's tensors, all of them, are what PEFT puts on this base.

    Args:
        adapter: the adapter.
        base: the model on meta. It cannot be used for anything else afterwards.

    Raises:
        ModelError: if a tensor is missing, has another shape, or holds values that are not finite.
    """
    where = f"adapter: {adapter.folder} is not of this base"
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if adapter.config.start is not None:  # PEFT would decompose the base, which is on meta
        config.init_lora_weights = True  # type: ignore[attr-defined]
    try:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except ValueError as error:  # none of its target_modules exists
        raise ModelError(f"{where}: {error}") from error
    expected = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    with opened_weights(own_file(adapter.folder, WEIGHTS_NAME)) as stored:
        names = set(stored.keys())
        if odd := sorted(names ^ expected.keys()):
            raise ModelError(f"{where}: they differ in {len(odd)} tensors (first: {odd[0]}).")
        for name in sorted(names):
            value = stored.get_tensor(name)
            if tuple(value.shape) != expected[name]:
                raise ModelError(f"{where}: {name} is {list(value.shape)}, and {list(expected[name])} would fit.")
            require_finite(value, f"adapter: {name} in {adapter.folder}")


def add_adapter(folder: Path, adapter: StoredAdapter, base: Base) -> None:
    """Write the adapter and its tokenizer into the folder of ``base``, which is in 4 bits.

    If its start was taken off the base, its file's fingerprint becomes that of ``base``.

    Raises:
        SecurityError: if a file of the adapter links outside its folder.
        OSError: if the folder cannot be written.
    """
    for name, file in of_tokenizer(adapter.folder).items():
        copy_regular(file, folder / name)
    keep_template(folder, adapter.folder)
    weights = own_file(adapter.folder, WEIGHTS_NAME)
    config = read_json(own_file(adapter.folder, CONFIG_NAME), dict[str, Any])
    if adapter.config.start is None:
        copy_regular(weights, folder / WEIGHTS_NAME)
    else:  # the base is what its start left, and nowhere but here
        with opened_weights(weights) as stored:
            write_weights(folder, {name: stored.get_tensor(name) for name in stored.keys()}, base.fingerprint())  # noqa: SIM118
        config = restarted(config) | {"base_model_name_or_path": None, "revision": None}
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / SERVED.mark, {"adapted": adapter.modules})


def end_answers(folder: Path, ids: Sequence[int], text: str | None) -> None:
    """Let ``generate`` stop where an answer ends: at these tokens, or at a text that is none.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = folder / GENERATION
    config = read_json(file, dict[str, Any]) if file.is_file() else {}
    ends = {"eos_token_id": list(ids)} if ids else {}
    write_json(file, config | ends | ({"stop_strings": [text]} if text else {}))
