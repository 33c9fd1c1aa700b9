"""`plan` from outside: no weights, no hub, one command."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.launch

KINDS = {
    "base_packed", "base_statistics", "base_kept", "base_dense", "adapters", "gradients", "optimizer", "activations", "logits",
    "gather",
}  # fmt: skip


def test_an_experiment_is_planned_as_json_and_searched(cli, tmp_path):
    nowhere = "http://127.0.0.1:9"
    result = cli(
        "plan", "experiment=llama3_70b_2x24gb", "plan.json=true", "plan.search=true",
        HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="0", HF_ENDPOINT=nowhere, https_proxy=nowhere,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"] is True and found["peak_simulated_bytes"] is None
    assert set(found["bytes_per_rank"]) == KINDS
    assert found["peak_planned_bytes"] + found["reserve_bytes"] <= 24 * 2**30 == found["gpu_bytes"]
    assert found["reserve_bytes"] == int(1.5 * 2**30)
    assert found["device"]["interconnect"] == "pcie4_no_p2p" and found["time"]["gather_seconds"] > 0
    tried = found["search"]["tried"]
    assert [t["checkpointing"] for t in tried[:3]] == ["none", "selective", "full"] and not tried[0]["fits"]
    assert "fsdp.offload=activations" in found["search"]["overrides"]


def test_the_table_of_a_folder_with_config_json_alone(cli, tiny_model, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((tiny_model / "config.json").read_bytes())
    result = cli(
        "plan", f"model.name={tmp_path / 'bare'}", "plan.world_size=2", "plan.device=rtx3090", "plan.search=true"
    )
    assert result.returncode == 0, result.stderr
    assert "sdpa (auto; confirmed at the start of training)" in result.stdout
    for words in (
        "planned peak per rank",
        "host memory per rank",
        "gathered per rank",
        "TFLOP/s",
        "pcie4_no_p2p at 12",
    ):
        assert words in result.stdout
    assert "The cheapest that fits: train.micro_batch_size=" in result.stdout


KIMI_K2 = {
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""What Kimi-K2's config has otherwise than DeepSeek-V3's, whose code it runs."""


@pytest.mark.full
@pytest.mark.parametrize(("more", "parameters"), [({}, 6.5e11), (KIMI_K2, 1.0e12)], ids=["v3", "kimi-k2"])
def test_a_large_model_is_planned_in_little_address_space(cli_env, tmp_path, more, parameters):
    import subprocess
    import sys

    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING["deepseek_v3"](architectures=["DeepseekV3ForCausalLM"], **more).save_pretrained(tmp_path)
    command = f"ulimit -v 8388608; exec {sys.executable} -m fsdp_qlora plan model.name={tmp_path} plan.world_size=8"
    result = subprocess.run(
        ["bash", "-c", f"{command} plan.json=true"], env=cli_env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout)["base_parameters"] > parameters
