"""Reads PEFT adapter folders: every setting in adapter_config.json is honoured or refused by name.

PEFT adds settings with every release, and most of them change what an adapter computes. So the JSON is read directly:
the keys we honour and those known to change nothing are listed here, and any other key must have its default value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from fsdp_qlora.adapters.experts import before_exchange
from fsdp_qlora.adapters.method import (
    PATTERNS,
    Method,
    build_method,
    method_of,
    of_target,
    shared_names,
    tensor_names,
)
from fsdp_qlora.adapters.names import IN_FILE, LORA_A
from fsdp_qlora.adapters.spellings import SpeltFile
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.adapters.whole import whole_in_file, within
from fsdp_qlora.config.choices import METHODS, NONE
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.shapes.tokens import TOKEN_ROWS

T = TypeVar("T")
CONFIG_NAME = "adapter_config.json"
_HONOURED = {"peft_type", "base_model_name_or_path", "revision", "trainable_token_indices", "modules_to_save"}
"""Keys honoured for every method; see also `Method.honoured`."""
_SELECTING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
"""Keys that select modules. Also honoured, but through the names of the tensors in the file."""
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "megatron_config",
    "fan_in_fan_out",  # how the base is stored, which we detect ourselves
    "runtime_config", "ensure_weight_tying",
    "qalora_group_size",  # only read with use_qalora
    "rank_dropout", "module_dropout", "init_ia3_weights",  # only read in training, or before it
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # only read with their init_lora_weights
}  # fmt: skip
"""Keys that do not change what a trained adapter computes."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base unchanged; others subtract the initial adapter from it."""
_MAX_ALPHA = 1e9
"""From here on the product overflows."""
_OFF = (None, False, "none", {}, [])


@dataclass(frozen=True)
class AdapterConfig:
    """The settings we read from an adapter's config."""

    r: int
    alpha: float
    variant: str
    """Name of the adapter's method."""
    base_model: str | None
    revision: str | None
    """Branch, tag or commit of the base model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings (``lora.options``)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks by regular expressions of names, as PEFT reads them."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas, likewise."""
    use_rslora: bool | None = None
    """DoRA's scaling; None: by alpha / r."""
    start: str | None = None
    """How it started, if that was from the base weights; the base is then what its start left of it."""
    loftq_iter: int = 1
    token_ids: tuple[int, ...] = ()
    """Ids of the tokens whose rows of embedding and head were trained."""
    parameters: Sequence[str] = ()
    """Its ``target_parameters``: names, or name endings, of stacked expert weights."""
    modules: Sequence[str] = ()
    """Whole names of the modules that were trained whole (``modules_to_save``)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base were trained."""
    biases: Sequence[str] = ()
    """Their names in the file."""
    exchanged: bool = False
    """Whether A and B of stacked weights may be exchanged, as before PEFT 0.19; see `experts.stored_value`."""

    def settings(self, modules: list[str]) -> LoraSettings:
        """Return the config as ``lora`` settings for these modules (`stored_modules`), with whole names for all."""
        parameters = [name for module in modules for name in self.stacked_in(module)]
        targets = [module for module in modules if not self.stacked_in(module)]
        names = [*targets, *parameters]
        return LoraSettings(
            variant=self.variant, r=self.r, alpha=self.alpha, target_modules=targets, options=dict(self.options),
            use_rslora=self.use_rslora, init_lora_weights=self.start, loftq_iter=self.loftq_iter, allow_large_svd=True,
            rank_pattern=_by_name(self.rank_pattern, names), alpha_pattern=_by_name(self.alpha_pattern, names),
            target_parameters=list(dict.fromkeys(parameters)), modules_to_save=list(self.modules),
            bias=self.bias,
        )  # fmt: skip

    def stacked_in(self, module: str) -> list[str]:
        """Return the whole names of the stacked weights that a module with tensors in the file wraps; none: a linear.

        The wrapper of one weight may be inside that of another (``experts.base_layer``); both are those of ``experts``.
        """
        owner = module.replace(".base_layer", "")
        ends = (name.rpartition(".") for name in self.parameters)
        return [f"{owner}.{key}" for end, _, key in ends if owner == end or owner.endswith("." + end)]


def _by_name(expressions: Mapping[str, T], targets: Iterable[str]) -> dict[str, T]:
    """Return the value of each target that one of PEFT's expressions means."""
    keys = [(name, get_pattern_key(list(expressions), name)) for name in targets]
    return {name: expressions[key] for name, key in keys if key in expressions}


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        ModelError: if it is missing, damaged, of no method known here, or has unsupported settings.
    """
    file = own_file(folder, CONFIG_NAME)
    try:
        values = read_json(file)
    except FileNotFoundError as error:
        raise ModelError(f"adapter: {folder} has no {CONFIG_NAME}: it is not a PEFT adapter folder.") from error
    except OSError as error:
        raise ModelError(f"adapter: {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"adapter: {file} is not JSON: {error}.") from error
    method = method_of(values) if isinstance(values, dict) else None
    if method is None:
        raise ModelError(f"adapter: {folder} is not an adapter of a method known here ({', '.join(METHODS)}).")
    if refused := _refused(values, method, (folder / FILE_NAME).is_file()):
        raise ModelError(
            f"adapter: {file} has unsupported settings that change what the adapter computes: "
            f"{', '.join(refused)}. Merge it into its base with PEFT, or train one without them."
        )
    config = _adapter_config(values, file, method)
    return _with_whole(config, values, folder)


def _with_whole(config: AdapterConfig, values: Mapping[str, Any], folder: Path) -> AdapterConfig:
    """Return ``config`` with the parameters of the base that the folder's file holds."""
    endings, weights = values.get("modules_to_save") or [], own_file(folder, WEIGHTS_NAME)
    if not isinstance(endings, list) or not all(isinstance(name, str) and name for name in endings):
        shown = json.dumps(endings)[:200]
        raise ModelError(f"adapter: {folder / CONFIG_NAME} is malformed: modules_to_save={shown}.")
    if not (endings or config.bias != NONE) or not weights.is_file():
        return config
    with opened_weights(weights) as stored:
        names = list(stored.keys())
    modules = whole_in_file(names, tensor_names(), endings)
    biases = [name for name in names if name.endswith(".bias") and not within(name, modules)]
    return replace(config, modules=modules, biases=biases if config.bias != NONE else [])


def _adapter_config(values: dict[str, Any], file: Path, method: Method) -> AdapterConfig:
    settings, rslora = method.settings(values), values.get("use_rslora", False)
    r, alpha = settings.r, settings.alpha
    names = [values.get("base_model_name_or_path"), values.get("revision")]
    wrong = [] if type(r) is int and r > 0 else [f"r={r!r}"]
    wrong += [] if type(alpha) in (int, float) and 0 < alpha < _MAX_ALPHA else [f"lora_alpha={alpha!r}"]
    wrong += [] if isinstance(rslora, bool) else [f"use_rslora={rslora!r}"]
    parameters = values.get("target_parameters") or []
    listed = isinstance(parameters, list) and all(isinstance(name, str) and "." in name for name in parameters)
    wrong += [] if listed else [f"target_parameters={parameters!r}"]
    wrong += [f"{name!r} as a name" for name in names if not isinstance(name, str | None)]
    ranks, alphas = (values.get(key) or {} for key in PATTERNS)
    wrong += [] if _are_patterns(ranks, int, 2**31) else [f"rank_pattern={ranks!r}"]
    wrong += [] if _are_patterns(alphas, float, _MAX_ALPHA) else [f"alpha_pattern={alphas!r}"]
    bias = values.get("bias", NONE)
    wrong += [] if bias in (NONE, "all", "lora_only") else [f"bias={bias!r}"]
    if wrong:
        raise ModelError(f"adapter: {file} is malformed: {', '.join(wrong)[:500]}.")
    base, revision = names
    start = _start_of(values.get("init_lora_weights"))
    loftq = values.get("loftq_config") if start == "loftq" else None
    iterations = loftq.get("loftq_iter", 1) if isinstance(loftq, dict) else 1
    if type(iterations) is not int or not 0 < iterations < 2**31:
        raise ModelError(f"adapter: {file} is malformed: loftq_iter={iterations!r}.")
    return AdapterConfig(
        r, float(alpha), method.name, base, revision, settings.options, ranks, alphas, settings.use_rslora, start,
        iterations, _token_ids(values.get("trainable_token_indices"), file), parameters,
        bias=bias, exchanged=before_exchange(values.get("peft_version")),
    )  # fmt: skip


def _start_of(word: Any) -> str | None:
    """Return the value of ``init_lora_weights`` if an adapter with it started from the base weights."""
    settings = LoraSettings(init_lora_weights=word) if isinstance(word, str) else LoraSettings()
    return settings.start if settings.start_is_known else None


def _token_ids(indices: Any, file: Path) -> tuple[int, ...]:
    """Return the ids of ``trainable_token_indices``: a list of the embedding's, or the same list for each table."""
    lists = list(indices.values()) if isinstance(indices, dict) else [indices or []]
    shown = f"trainable_token_indices={json.dumps(indices)[:200]}"
    if any(not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids) for ids in lists):
        raise ModelError(f"adapter: {file} is malformed: {shown}.")
    if any(ids != lists[0] for ids in lists):
        raise ModelError(f"adapter: {file} trains different tokens in its tables ({shown}), which is not supported.")
    return tuple(lists[0]) if lists else ()


def _are_patterns(values: Any, kind: type, below: float) -> bool:
    """Whether ``values`` are expressions with positive numbers of ``kind``."""
    if not isinstance(values, dict):
        return False
    for expression, value in values.items():
        if type(value) not in (int, kind) or not 0 < value < below:
            return False
        try:
            re.compile(expression)
        except re.error:
            return False
    return True


def _refused(values: dict[str, Any], method: Method, has_start: bool) -> list[str]:
    """Return the settings that are neither honoured nor harmless, with their values."""
    defaults = {f.name: f.default for f in fields(method.config) if f.default is not MISSING}
    known = _HONOURED | _SELECTING | _HARMLESS | method.honoured
    refused = []
    for key, value in values.items():
        if key == "init_weights":  # MiSS: the words "bat" and "mini" choose what is computed
            plain = isinstance(value, bool) or value == defaults.get(key)
        elif key == "init_lora_weights":
            plain = any(value is v if isinstance(v, bool) else value == v for v in _PLAIN_STARTS)
            plain = plain or (has_start and _start_of(value) is not None)
        else:
            plain = key in known or value in _OFF or (key in defaults and value == defaults[key])
        if not plain:
            refused.append(f"{key}={json.dumps(value)}"[:200])
    return refused


def adapted_modules(names: Iterable[str], file: Path, method: Method | None = None) -> list[str]:
    """Return the linears with an adapter, given the tensor names in an adapter file; rows of tokens are left out.

    Raises:
        ModelError: if a tensor does not belong to an adapter of ``method`` (None: of any method) on a linear, or a
            linear has only one of LoRA's matrices.
    """
    known = tensor_names() if method is None else method.tensor_names()
    shared = shared_names() if method is None else {f"base_model.{name}" for name in method.shared}
    tensors = "|".join(map(re.escape, sorted(known)))
    of_targets = {name for name in set(names) - shared if not name.endswith(f".{TOKEN_ROWS}")}
    matches = {name: re.fullmatch(rf"base_model\.model\.(.+)\.(?:{tensors})", name) for name in of_targets}
    if odd := sorted(name for name, match in matches.items() if match is None):
        raise ModelError(
            f"adapter: {file} holds {len(odd)} tensor(s) that are no adapter's of a linear (first: {odd[0]}); "
            "such adapters are not supported."
        )
    if not matches:
        raise ModelError(f"adapter: {file} holds no tensors.")
    modules = sorted({match[1] for match in matches.values() if match is not None})
    if method is not None and method.config is LoraConfig:
        missing = {
            f"{IN_FILE}{module}.{tensor}" for module in modules
            for tensor in method.tensors_with({name for name in known if f"{IN_FILE}{module}.{name}" in of_targets})
        } - of_targets  # fmt: skip
        if missing:
            raise ModelError(
                f"adapter: {file} lacks {len(missing)} tensor(s) (first: {min(missing)}), without which an adapter is "
                "not whole; PEFT would go on with what it is initialised with. Copy the file again."
            )
    return modules


def blamed_on_adapter(error: FsdpQloraError, folder: Path) -> FsdpQloraError:
    """Turn an error about ``lora`` settings that came from an adapter's folder into one about the adapter."""
    text = str(error)
    if not text.startswith("lora."):
        return error
    said = FsdpQloraError(f"adapter: {folder} does not fit this model: {text.partition(': ')[2]}")
    said.exit_code, said.alike = error.exit_code, error.alike
    return said


def require_shapes(file: Path, wanted: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> None:
    """Check the shapes of an adapter file's tensors, by name.

    Raises:
        ModelError: naming the first ones that are not as wanted.
    """
    if other := [name for name, shape in wanted.items() if list(stored[name]) != list(shape)]:
        shown = "; ".join(f"{name} is {list(stored[name])}, not {list(wanted[name])}" for name in other[:3])
        raise ModelError(
            f"adapter: {file} is not of this base, or of another rank: {len(other)} of its {len(wanted)} tensors have "
            f"other shapes ({shown}{' ...' if len(other) > 3 else ''})."
        )


WEIGHTS_NAME = "adapter_model.safetensors"


def stored_modules(folder: Path, config: AdapterConfig | None = None) -> list[str]:
    """Return the names of the modules for which an adapter folder has tensors.

    Raises:
        ModelError: if there is no file of tensors, or it holds anything but an adapter's, or a rank that ``config``
            does not say.
        SecurityError: if the file is a link out of the folder.
    """
    file = own_file(folder, WEIGHTS_NAME)
    if not file.is_file() and (pickled := own_file(folder, "adapter_model.bin")).is_file():
        raise ModelError(
            f"adapter: {folder} has no {WEIGHTS_NAME}, only {pickled.name}: a pickle, which can run anybody's code "
            'when it is read, so it is not read here. Convert it: python -c "import torch; from safetensors.torch '
            f"import save_file; save_file(torch.load('{pickled}', weights_only=True), '{file}')\"."
        )
    if not file.is_file():
        raise ModelError(f"adapter: {folder} has no {WEIGHTS_NAME}.")
    with opened_weights(file) as stored:
        names = stored.keys()
        if config is not None:
            names = [name for name in names if name not in config.biases and not within(name, config.modules)]
        modules = adapted_modules(names, file, None if config is None else build_method(config.variant))
        settings = None if config is None else config.settings(modules)
        for name in names:
            module = name.removeprefix("base_model.model.").removesuffix(LORA_A)
            if config is None or settings is None or not name.endswith(LORA_A) or config.stacked_in(module):
                continue  # how many matrices are stacked is the model's to say: `load_adapter` compares shapes
            r = of_target(settings, module).r
            if (shape := stored.get_slice(name).get_shape())[:1] != [r]:
                raise ModelError(f"adapter: {folder / CONFIG_NAME} says r={r}, but {name} is {shape} in {file}.")
        return modules


@contextmanager
def opened_weights(file: Path) -> Iterator[SpeltFile]:
    """Open an adapter's safetensors file; its tensors have PEFT's names, whatever tool spelt them.

    Raises:
        ModelError: if it is damaged, or of a layout that PEFT does not read.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            yield SpeltFile(stored, file)
    except SafetensorError as error:
        raise ModelError(f"adapter: {file} is damaged: {error}.") from error
