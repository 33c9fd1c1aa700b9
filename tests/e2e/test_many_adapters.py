"""Several adapters by name on the command line: each answers as it does alone, or the chosen one does."""

from __future__ import annotations

from tests.distributed.test_many_adapters import CONFIGS, _dense_copy, make_adapters


def test_each_adapter_answers_or_the_chosen_one(cli, tiny_model, tmp_path):
    folders = make_adapters(_dense_copy(tiny_model, "nf4"), tmp_path / "adapters", CONFIGS)
    common = ["prompt=hello", "generate.max_new_tokens=8", f"model.name={tiny_model}", "launcher.device=cpu"]
    common.append("precision=fp32")  # in bf16, adapters with names round elsewhere than the fused product of one
    alone = {name: cli("generate", f"adapter={folder}", *common).stdout for name, folder in folders.items()}
    assert len(set(alone.values())) > 1
    several = "adapter={" + ", ".join(f"{name}: {folder}" for name, folder in folders.items()) + "}"
    said = cli("generate", several, *common)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith("".join(f"{name}:\n{text}" for name, text in alone.items()))
    assert "adapter coder: rslora on 14 linears, 26,880 parameters, 0.1 MB" in said.stdout
    assert cli("generate", several, "generate.adapter=coder", *common).stdout == alone["coder"]
    base = cli("generate", *common).stdout
    assert cli("generate", several, "generate.adapter=__base__", *common).stdout.endswith(base)
    missing = cli("generate", f"adapter={{poet: {folders['poet']}, coder: nowhere}}", *common)
    assert missing.returncode == 2
    assert missing.stderr.count("fsdp-qlora: ") == 1 and "nowhere has no adapter_config.json" in missing.stderr
