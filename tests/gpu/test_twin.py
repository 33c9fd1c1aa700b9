"""On a GPU: small models of many families are what upstream's own code is there, padded, packed and in bf16.

The comparison is the product's own (`fsdp_qlora.checks.twin`): its other side is stock transformers, bitsandbytes and
PEFT on the same device. FSDP_QLORA_TEST_DEVICE=cpu is a dry run of the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fsdp_qlora.attention.varlen import VARLEN
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.check import check_model
from tests import upstream
from tests.gpu.test_gpu import _HERE, DEVICE, world
from tests.matrix import VARIANTS, small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
    "gpt_oss", "phi", "phi3", "deepseek_v3", "glm4_moe", "olmo2", "olmoe", "granite", "cohere2", "bloom",
    "starcoder2", "smollm3", "nemotron", "jamba", "mamba2",
)  # fmt: skip
KINDS = {name: (name, {}) for name in FAMILIES} | VARIANTS if DEVICE != "cpu" else {"llama": ("llama", {})}
ALONE = ("gpt_oss", "bloom", "jamba", "mamba2")
"""Families that no attention keeps apart where rows share a sequence: refused packed (docs/families.md)."""
NO_VARLEN = (*ALONE, "gemma2", "gemma3_text, capped", "deepseek_v3", "nemotron")
"""Families that varlen attention is refused for: a soft cap, values of another size, code of their own, a bias."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with world(DEVICE) as found:
        yield found


def _settings(folder: Path, precision: str, attention: str, packing: bool) -> RunConfig:
    config = RunConfig()
    return replace(
        config,
        model=replace(config.model, name=str(folder), check="always", attn_implementation=attention),
        data=replace(config.data, max_length=64, packing=packing),
        train=replace(config.train, micro_batch_size=2),
        precision=replace(config.precision, name=precision),
        quant=replace(config.quant, allow_16bit=True),
    )


def _folder_name(kind: str) -> str:
    return kind.replace(", ", "-").replace(" ", "-")


@pytest.fixture(params=KINDS, scope="module")
def model_folder(request, ranks, tmp_path_factory) -> Path:
    model_type, more = KINDS[request.param]
    folder = tmp_path_factory.mktemp("models") / _folder_name(request.param)
    folder.mkdir()
    return upstream.write_random(folder, small_config(model_type, **more))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padded_rows(model_folder, ranks, precision, record_property):
    verdict = check_model(_settings(model_folder, precision, "auto", False), model_folder, ranks)
    record_property("attention", verdict.attention)
    record_property("fell", str(verdict.fell))


@pytest.mark.parametrize("attention", ["auto", VARLEN])
def test_packed_rows(model_folder, ranks, attention, record_property):
    config = _settings(model_folder, "bf16", attention, True)
    kind = next(name for name in KINDS if _folder_name(name) == model_folder.name)
    if kind in (NO_VARLEN if attention == VARLEN else ALONE):
        with pytest.raises(FsdpQloraError) as refused:
            check_model(config, model_folder, ranks)
        assert refused.value.exit_code == 2
        record_property("refused", str(refused.value))
        return
    verdict = check_model(config, model_folder, ranks)
    record_property("attention", verdict.attention)
    record_property("fell", str(verdict.fell))
