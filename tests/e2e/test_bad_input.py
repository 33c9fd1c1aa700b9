"""Bad input: exit code 2, one clear message, no traceback, no hang."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests import tiny


def _refused(result, *words, code=2):
    assert result.returncode == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr, result.stderr


COMPOSED = {
    "misspelt key": (["optm.lr=1"], ["optm.lr", "Did you mean 'optim.lr'?"]),
    "two misspelt keys at once": (["optm.lr=1", "train.max_step=3"], ["optim.lr", "train.max_steps"]),
    "misspelt group option": (["quant=nf5"], ["quant", "'nf5'", "Did you mean 'nf4'?"]),
    "wrong type": (["train.max_steps=many"], ["train.max_steps", "a whole number", "many"]),
    "wrong choice": (["lora.variant=loar"], ["lora.variant", "Did you mean 'lora'?"]),
    "impossible pair": (["train.global_batch_size=2", "train.micro_batch_size=4"], ["train.micro_batch_size"]),
    "eval of nothing": (["train.eval_every=5", "data.eval_fraction=0"], ["train.eval_every", "data.eval"]),
    "excluding each other": (
        ["quant.cache_dequantized=true", "train.activation_checkpointing=full"],
        ["quant.cache_dequantized", "activation_checkpointing=full"],
    ),
    "block size that bitsandbytes lacks": (["quant.block_size=48"], ["quant.block_size", "64, 128", "48"]),
    "negative threshold": (["quant=int8", "quant.llm_int8_threshold=-1"], ["quant.llm_int8_threshold", "negative"]),
    "unknown optimizer": (["optim=adamw_8bt"], ["optim", "Did you mean 'adamw_8bit'?"]),
    "unknown format of some": (["quant.overrides={*.q_proj:int9}"], ["quant.overrides", "Did you mean 'int8'?"]),
    "fp16": (["precision=fp16"], ["precision", "bf16", "65504"]),
    "search without a memory": (["plan.search=true"], ["plan.search", "plan.gpu"]),
    "no equals sign": (["quickstart"], ["quickstart", "key=value"]),
    "unknown experiment": (["experiment=quickstrt"], ["experiment", "Did you mean 'quickstart'?"]),
    "run name that climbs": (["run.name=../x"], ["run.name"]),
    "kernels for GPUs": (["train.kernels=liger", "launcher.device=cpu"], ["train.kernels", "need a GPU"]),
    "training a quantized base": (["quant=nf4", "lora=none"], ["lora: none", "quant=nf4"]),
    "negative": (["optim.lr=-1"], ["optim.lr", "negative"]),
}


@pytest.mark.parametrize("case", COMPOSED)
def test_settings_are_refused_before_torch_is_imported(cli, case):
    arguments, words = COMPOSED[case]
    started = time.monotonic()
    result = cli("train", *arguments, timeout=90, cold=True, PYTHONPROFILEIMPORTTIME="1")
    assert "| torch\n" not in result.stderr and "| torch." not in result.stderr
    assert time.monotonic() - started < 10  # 0.3 s on a quiet machine; the promise of 2 s is measured by hand
    _refused(result, *words)


def test_unknown_verb_and_usage(cli):
    _refused(cli("trian"), "Did you mean 'train'?")
    assert "usage: fsdp-qlora VERB" in cli("--help").stdout


def test_own_yaml_with_a_misspelt_key(cli, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lrr: 1\n")
    _refused(cli("train", "--config-dir", str(tmp_path), "experiment=mine"), "lrr")


def test_run_from_something_else(cli, tmp_path):
    _refused(cli("train", "run_from=nowhere.yaml"), "nowhere.yaml")
    (tmp_path / "odd.yaml").write_text("optim: {lrr: 1}\n")
    _refused(cli("train", "run_from=odd.yaml"), "optim.lrr", "optim.lr")


def _truncated(tiny_model: Path, folder: Path) -> Path:
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.launch
def test_missing_model_folder(cli, tiny_run):
    _refused(cli("train", *tiny_run, "model.name=/no/such/model"), "model.name", "/no/such/model")


@pytest.mark.full
@pytest.mark.launch
def test_truncated_weights_on_two_ranks(cli, tiny_run, tiny_model, tmp_path):
    (tmp_path / "cut").mkdir()
    folder = _truncated(tiny_model, tmp_path / "cut")
    started = time.monotonic()
    result = cli("train", *tiny_run, f"model.name={folder}", "launcher.nproc_per_node=2")
    _refused(result, "model.safetensors", "truncated")
    assert result.stderr.strip().splitlines()[-1].startswith("fsdp-qlora, rank")
    assert time.monotonic() - started < 60
    assert json.loads((tmp_path / "outputs/tiny/exit.json").read_text())["code"] == 2


DATA = {
    "missing": (None, ["there is no file"]),
    "empty": ("", ["is empty"]),
    "malformed": ('{"text": "a b c"}\n{"text": "d e f"}\n{"text": oops}\n', ["line 3", "not valid JSON"]),
    "unknown columns": ('{"question": "a", "reply": "b"}\n', ["data.format", "question"]),
    "no supervised token": (
        json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n",
        ["none of the 1 rows has a supervised token"],
    ),
    "unknown role": (
        json.dumps({"messages": [{"role": "wizard", "content": "hello"}]}) + "\n",
        ["line 1", "wizard"],
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_is_refused(tmp_path, tiny_model, case, monkeypatch):
    # In this process, through the same functions `train` calls: a launch each would cost 10 s.
    from fsdp_qlora.config.schema import from_dict
    from fsdp_qlora.errors import DataError
    from fsdp_qlora.run.tokens import prepare_tokens

    text, words = DATA[case]
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as refusal:
        prepare_tokens(from_dict({"model": {"name": str(tiny_model)}, "data": {"train": str(file)}}))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.launch
def test_malformed_data_ends_both_ranks(cli, tiny_run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    result = cli("train", *tiny_run, "data.train=bad.jsonl", "launcher.nproc_per_node=2")
    _refused(result, "bad.jsonl, line 2")
    assert result.stderr.count("line 2") == 1


@pytest.mark.launch
def test_unknown_target_module_lists_the_real_ones(cli, tiny_run):
    _refused(cli("train", *tiny_run, "lora.target_modules=[query]"), "'query'", "q_proj, k_proj, v_proj")


@pytest.mark.full
@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_run_on_a_cpu(cli, tiny_run, verb, name):
    result = cli(verb, *tiny_run, f"model.attn_implementation={name}", CUDA_VISIBLE_DEVICES="")
    _refused(result, f"model.attn_implementation: {name} ", "and this run is on a CPU; choose blockwise, varlen")


@pytest.mark.full
@pytest.mark.launch
def test_kernels_that_cannot_run_here(cli, tiny_run):
    """Before the data are read and the weights are loaded."""
    result = cli("train", *tiny_run, "launcher.device=auto", "train.kernels=liger", CUDA_VISIBLE_DEVICES="")
    _refused(result, "train.kernels: liger needs a GPU, and this run is on a CPU; set train.kernels=torch or compile.")
    assert "training sequences" not in result.stdout


def test_more_ranks_than_devices(cli, tiny_run):
    import torch

    devices = torch.cuda.device_count()
    result = cli("train", *tiny_run, "launcher.device=cuda", f"launcher.nproc_per_node={devices + 1 if devices else 2}")
    _refused(result, "launcher.", "cuda")


def test_more_ranks_than_devices_says_how_many(monkeypatch):
    from fsdp_qlora.distributed import process
    from fsdp_qlora.errors import ConfigError

    monkeypatch.setattr(process, "device_types", lambda: {"cuda": 1, "cpu": 0})
    with pytest.raises(ConfigError, match=r"2 ranks on this node, but only 1 cuda device"):
        process.choose_device("cuda", process.Placement(0, 0, 2, 2))


def test_bad_model_files(tmp_path):
    from fsdp_qlora.errors import ModelError
    from fsdp_qlora.load.safetensors import SafetensorsFolder

    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        SafetensorsFolder(tmp_path)
    folder = tiny.make_model(tmp_path / "model", max_shard_size="200KB")
    part = sorted(folder.glob("*.safetensors"))[0]
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(ModelError, match="missing"):
        SafetensorsFolder(folder)
    for damaged in (b"", data[:5], b"\xff" * 8 + data[8:], data[:8] + b"x" * 100):
        part.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"damaged|truncated"):
            SafetensorsFolder(folder)
