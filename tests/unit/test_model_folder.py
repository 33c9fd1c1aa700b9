"""What is written beside a merged model's weights, and where such a folder may be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import DataError, ModelError
from fsdp_qlora.export.model_folder import MERGE, beside_the_weights, keep_template, of_tokenizer, require_free
from fsdp_qlora.files.write import copy_regular
from fsdp_qlora.model.tokenizer import template_beside
from fsdp_qlora.run.tokens import open_tokenizer
from tests.tiny import make_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def _adapter(folder: Path, template: object) -> Path:
    """Make an adapter's folder with a tokenizer whose template is in its config, as older tools write it."""
    make_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("template", [
    TEMPLATE,
    pytest.param([{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}], marks=pytest.mark.full),
])  # fmt: skip
def test_a_template_in_an_adapters_tokenizer_config_is_the_merged_models(tmp_path, template):
    """transformers would take the base's, as that is in a file of its own."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    for folder in (base, merged, tmp_path / "adapter"):
        folder.mkdir()
    make_tokenizer(base)
    (base / "adapter_config.json").write_text("{}")  # somebody kept an adapter there, which is not this model's
    adapter = _adapter(tmp_path / "adapter", template)
    for name, file in {**beside_the_weights(base), **of_tokenizer(adapter)}.items():
        copy_regular(file, merged / name)
    keep_template(merged, adapter)
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE
    assert not (merged / "adapter_config.json").exists()
    file = template_beside(adapter)
    settings = from_dict({"model": {"name": str(base)}, "data": {"template": str(file)}})
    assert open_tokenizer(settings, base).chat_template == TEMPLATE, "what generate asks with"


@pytest.mark.full
def test_a_tokenizer_config_without_a_template_leaves_the_bases(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    _adapter(adapter, None)
    assert template_beside(adapter) is None
    shutil.copy(adapter / "tokenizer.json", tmp_path)
    shutil.copy(adapter / "tokenizer_config.json", tmp_path)
    settings = from_dict(
        {"model": {"name": str(tmp_path)}, "data": {"template": str(tmp_path / "tokenizer_config.json")}}
    )
    with pytest.raises(DataError, match=r"data.template: .* holds no chat template"):
        open_tokenizer(settings, tmp_path)
    (adapter / "tokenizer_config.json").write_text("{no json")
    with pytest.raises(ModelError, match=r"adapter: .*tokenizer_config.json cannot be read"):
        template_beside(adapter)


@pytest.mark.full
def test_a_target_below_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ModelError, match=r"export.to: .*/file/deep/x is below .*/file, which is a file"):
        require_free(tmp_path / "file/deep/x", MERGE, overwrite=True)
    require_free(tmp_path / "new/deep/x", MERGE, overwrite=False)


@pytest.mark.full
@pytest.mark.parametrize(("group", "key", "value"), [
    ("generate", "temperature", float("nan")), ("generate", "temperature", float("inf")), ("generate", "seed", 10**20),
    ("run", "seed", 2**63), ("plan", "world_size", 2**63), ("export", "weights", {"a": float("nan")}),
])  # fmt: skip
def test_a_number_that_nothing_computes_with_is_refused_in_every_group(group, key, value):
    said = failures(from_dict({group: {key: value}}))
    assert any(line.startswith(f"{group}.{key}: ") and ("finite" in line or "too large" in line) for line in said), said
