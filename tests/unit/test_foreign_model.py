"""S7, S13, R14: folders of models and adapters that somebody made: no links out of them, odd contents are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fsdp_qlora.adapters.folder import read_adapter_config
from fsdp_qlora.adapters.loading import load_adapter
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.errors import FsdpQloraError, ModelError, SecurityError
from fsdp_qlora.export.quantized_base import export_base
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.load.stored import quantization_of
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.model.tokenizer import build_tokenizer
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.run.inference import with_adapter

SECRET = "CANARY"
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "theirs"))


@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    file = tmp_path / "private/key.json"
    file.write_text(json.dumps({"key": SECRET}))
    return file


def _base_4bit(model: Path, target: Path) -> None:
    base = build_skeleton(model, torch.float32, "eager")
    export_base(base, model, target, build_format("nf4", True), CPU)


NAMES = ["chat_template.jinja", "tokenizer_config.json", "more.txt", "notes.json", "x.model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_a_model_folder_is_refused(model, private, tmp_path, name):
    """S7, S13: the tokenizer goes into every adapter folder, and all that lies beside the weights into a base-4bit."""
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(private)
    for read in (lambda: build_tokenizer(model), lambda: _base_4bit(model, tmp_path / "given_away")):
        with pytest.raises(SecurityError, match=name):
            read()
    assert not (tmp_path / "given_away").exists()


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors", "config.json", "code.py"])
def test_a_base_that_is_given_away_has_no_content_of_links(model, private, tmp_path, name):
    """S13: weights, code and licence, too, however honest what the link leads to."""
    elsewhere = private.with_name(name)
    (model / name).rename(elsewhere) if (model / name).exists() else elsewhere.write_text(SECRET)
    (model / name).symlink_to(elsewhere)
    with pytest.raises(SecurityError, match=name):
        _base_4bit(model, tmp_path / "given_away")
    assert not (tmp_path / "given_away").exists()


def test_a_second_chat_template_that_is_a_link_is_refused(model, private):
    """S7: folders in it count."""
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").symlink_to(private)
    with pytest.raises(SecurityError, match=r"tools\.jinja"):
        build_tokenizer(model)
    shutil.rmtree(model / "additional_chat_templates")
    (model / "additional_chat_templates").symlink_to(private.parent)
    with pytest.raises(SecurityError, match="additional_chat_templates"):
        build_tokenizer(model)


def test_the_hubs_cache_is_links_and_is_taken(model, private, tmp_path):
    """S13: they stay within the model's own repository."""
    cache = tmp_path / "hub/models--them--theirs"
    snapshot, blobs = cache / "snapshots/0a1b", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    build_tokenizer(snapshot)
    _base_4bit(snapshot, tmp_path / "base")
    assert not [file for file in (tmp_path / "base").iterdir() if file.is_symlink()]
    assert (tmp_path / "base/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    (snapshot / "more.json").symlink_to(private)
    with pytest.raises(SecurityError, match=r"more\.json"):
        _base_4bit(snapshot, tmp_path / "again")


def test_a_target_that_another_export_filled_is_left_alone(model, tmp_path):
    """R17: two at once: one of them writes it, the other one says so, and neither leaves anything behind."""
    base = build_skeleton(model, torch.float32, "eager")

    def other(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "base").mkdir(exist_ok=True)
            (tmp_path / "base/config.json").write_text("the other's")

    with pytest.raises(ModelError, match=r"export\.to: .*another process"):
        export_base(base, model, tmp_path / "base", build_format("nf4", True), CPU, other)
    assert {f.name for f in tmp_path.iterdir()} == {"base", "theirs"}
    assert (tmp_path / "base/config.json").read_text() == "the other's"


NAME = "base_model.model.q.lora_{}.weight"


class _Adapted(nn.Module):
    """What `load_adapter` fills: one adapter of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        sides = {"lora_A": nn.Linear(8, 2, bias=False), "lora_B": nn.Linear(2, 8, bias=False)}
        q = nn.ModuleDict({name: nn.ModuleDict({"default": side}) for name, side in sides.items()})
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"q": q})})


def _adapter(folder: Path, value: float = 1.0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings
    (folder / "adapter_config.json").write_text(json.dumps(values))
    tensors = {NAME.format("A"): torch.full((2, 8), value), NAME.format("B"): torch.full((8, 2), value)}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def _take(folder: Path) -> RunConfig:
    """Do what `evaluate` and `generate` do with an adapter before anything is loaded, then load it."""
    found = with_adapter(from_dict({"model": {"name": "m"}}), folder)
    load_adapter(folder, _Adapted())
    return found


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_an_adapter_folder_is_refused(tmp_path, private, name):
    """S7: `evaluate`, `generate` and `lora.init_from` read somebody's adapter."""
    folder = _adapter(tmp_path / "adapter")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(SecurityError, match=name):
        _take(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_an_adapter_of_no_numbers_is_refused(tmp_path, value, dtype):
    """R14: and one of numbers is taken in any dtype."""
    with pytest.raises(ModelError, match="not finite"):
        _take(_adapter(tmp_path / "adapter", value, dtype))
    _take(_adapter(tmp_path / "adapter", 1.0, dtype))


ODD = [None, True, False, -1, 0, 0.5, 10**12, 10**400, float("nan"), float("inf"), "x", "", "\0", [], [[]], {}, [1] * 3,
       {"x": {"y": []}}, "x" * 100_000]  # fmt: skip
TEXTS = ["", "{", "[]", '"x"', "null", "3", "\xff", "[" * 100_000, '{"a":' * 100_000, "{}", "\0"]


@pytest.mark.parametrize("key", ["r", "lora_alpha", "use_rslora", "peft_type", "base_model_name_or_path", "revision",
                                 "target_modules", "init_lora_weights", "alpha_pattern", "other"])  # fmt: skip
def test_an_adapter_config_of_odd_values_is_taken_or_one_line(tmp_path, key):
    """R14: no value at any key is a traceback."""
    refused = 0
    for value in ODD:
        folder = _adapter(tmp_path / "adapter", **{key: value})
        try:
            _take(folder)
        except FsdpQloraError as error:
            assert error.exit_code == 2 and "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
    assert refused >= (0 if key in ("target_modules", "revision", "base_model_name_or_path") else 5)


def test_a_rank_that_is_not_that_of_the_tensors_is_refused_before_anything_is_built(tmp_path):
    """R14: r=10^9 would ask for the memory of it."""
    with pytest.raises(ModelError, match="says r=1000000000, but"):
        _take(_adapter(tmp_path / "adapter", r=10**9))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_an_adapter_config_that_is_none_is_one_line(tmp_path, text):
    """R14: nor is any text."""
    folder = _adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"^adapter: "):
        read_adapter_config(folder)


def _build(model: Path) -> None:
    quantization_of(model)
    read_shapes(build_skeleton(model, torch.float32, "eager"))


def _tokenize(model: Path) -> None:
    tokenizer = build_tokenizer(model)
    end_of_turn(model, load_config(model), tokenizer)


def _some(value: Any, key: str) -> bool:
    """Whether to try this value: a model that is only too large is another matter."""
    return not (isinstance(value, int) and value > 10**6 and key in ("num_hidden_layers", "vocab_size", "hidden_size"))


def _tries(model: Path, name: str, read: Any) -> int:
    """Read the folder with each odd text in the file, and each odd value at each of its keys; return the refusals."""
    good, refused = (model / name).read_text(), 0
    values = json.loads(good)
    odd = [json.dumps(values | {key: value}) for key in values for value in ODD[:-1] if _some(value, key)]
    for text in [*TEXTS, *odd]:
        (model / name).write_text(text, encoding="latin-1")
        try:
            read(model)
        except FsdpQloraError as error:
            assert error.exit_code == 2, text[:300]
            refused += 1
    (model / name).write_text(good)
    read(model)
    return refused


@pytest.mark.full
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_model_folder_of_odd_files_is_taken_or_refused(model, name):
    """R14: whatever upstream's code makes of them, it is no traceback."""
    refused = _tries(model, name, _build if name == "config.json" else _tokenize)
    assert refused > 10 or name == "generation_config.json"


ODD_CONFIGS = {"num_attention_heads": 0, "head_dim": -1, "num_key_value_heads": 0, "pad_token_id": 10**9,
               "architectures": [[]], "dtype": float("nan")}  # fmt: skip


@pytest.mark.parametrize("key", ODD_CONFIGS)
def test_odd_configs_that_were_tracebacks(model, key):
    """R14: those that were found first, for the fast tier."""
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {key: ODD_CONFIGS[key]}))
    try:
        _build(model)
    except ModelError as error:
        assert error.exit_code == 2
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(values | {"model_max_length": {}}))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        build_tokenizer(model)
