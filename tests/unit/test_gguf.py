"""GGUF files are re-opened and compared; llama.cpp's converters are fetched once, verified, and run apart."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

from fsdp_qlora.config.convert import build
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.errors import ConfigError, ModelError, NumericsError
from fsdp_qlora.export import llama_cpp
from fsdp_qlora.export.gguf import GgufFile, settle_tokens, verify_adapter, verify_model
from fsdp_qlora.export.gguf_adapter import write_plain
from fsdp_qlora.export.gguf_source import Vocabulary, check_model, link_model, read_vocabulary
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.shapes.linears import ModelShapes
from tests.distributed.test_merged import write_adapter
from tests.unit.test_embedded import index  # noqa: F401  (a fixture)


def refusal(**export: str) -> str:
    values = {"what": export.pop("what", "gguf"), "export": {"to": "out", **export}, "model": {"name": "base"}}
    with pytest.raises(ConfigError) as raised:
        check_verb("export", build(RunConfig, values))
    return str(raised.value)


def test_types_that_the_converter_does_not_write_are_refused_with_what_makes_them():
    said = refusal(gguf_type="q4_k_m")
    assert "f32, f16, bf16, q8_0, tq1_0, tq2_0, not 'q4_k_m'" in said
    assert "llama-quantize model-f16.gguf OUT.gguf Q4_K_M" in said and "ollama create NAME -q q4_k_m" in said
    assert "export.gguf_base" in refusal(gguf_base="qwen3:8b")
    assert "export.gguf_type: is about GGUF files" in refusal(what="merged", gguf_type="q8_0")


@pytest.fixture
def shapes(tiny_model: Path) -> ModelShapes:
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'fsdp-qlora[gguf]'")
    return read_shapes(build_skeleton(tiny_model, torch.bfloat16, "eager"))


@pytest.fixture
def vocabulary(tiny_model: Path) -> Vocabulary:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return read_vocabulary(tokenizer, tokenizer.eos_token_id, begins=True)


def write_model(file: Path, shapes: ModelShapes, vocabulary: Vocabulary, without: str = "", **changed: object) -> Path:
    """Write a Llama's file as the converter does, but for what is asked."""
    import numpy as np
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(str(file), "llama")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, len(shapes.layers))
    values = {
        "tokens": [vocabulary.tokens[i][0] for i in range(shapes.embedding_rows)], "add_bos": False, "eos": vocabulary.end,
        "template": vocabulary.template, "fill": 0.5, "cut": 0,
    } | changed  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(values["tokens"])  # type: ignore[arg-type]
    writer.add_eos_token_id(values["eos"])  # type: ignore[arg-type]
    writer.add_add_bos_token(values["add_bos"])  # type: ignore[arg-type]
    writer.add_chat_template(values["template"])  # type: ignore[arg-type]
    for name, shape in shapes.parameters.items():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called != without:
            size = (shape[0] - 1, *shape[1:]) if called == values["cut"] else shape
            writer.add_tensor(called, np.full(size, values["fill"], dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.full
def test_a_whole_file_is_accepted_and_any_other_refused(tmp_path, shapes, vocabulary):
    whole = write_model(tmp_path / "whole.gguf", shapes, vocabulary)
    assert verify_model(whole, shapes, vocabulary) == len(shapes.parameters)
    tokens = [vocabulary.tokens[i][0] for i in range(shapes.embedding_rows)]
    for changed, said in {
        "without": "missing: model.layers.1.mlp.up_proj.weight", "cut": r"blk\.0\.attn_q\.weight is", "tokens": "token 3 is",
        "eos": "eos_token_id is 0", "template": "another one", "fill": r"do not fit f16.*bf16",
    }.items():  # fmt: skip
        values = {
            "without": "blk.1.ffn_up.weight", "cut": "blk.0.attn_q.weight",
            "tokens": [*tokens[:3], tokens[4], tokens[3], *tokens[5:]], "eos": 0, "template": "{{ 1 }}", "fill": 1e6,
        }  # fmt: skip
        odd = write_model(tmp_path / f"{changed}.gguf", shapes, vocabulary, **{changed: values[changed]})
        with pytest.raises(NumericsError, match=said):
            verify_model(odd, shapes, vocabulary)
    short = tmp_path / "short.gguf"
    short.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(NumericsError, match="is no whole GGUF file"):
        verify_model(short, shapes, vocabulary)


@pytest.mark.full
def test_a_text_begins_and_ends_as_in_training(tmp_path, shapes, vocabulary):
    file = write_model(tmp_path / "m.gguf", shapes, vocabulary, add_bos=True, eos=0)
    settle_tokens(file, vocabulary)
    assert verify_model(file, shapes, vocabulary) == len(shapes.parameters)
    assert GgufFile(file).value("tokenizer.ggml.add_bos_token") is False


@pytest.mark.full
def test_a_model_whose_files_contradict_its_config_is_refused(tmp_path, tiny_model):
    """Both would be converted without a word: the reader of the file decides which head it takes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    link_model(tiny_model, folder, {}, False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    skeleton = build_skeleton(folder, torch.bfloat16, "eager")
    assert check_model(folder, skeleton, tokenizer).tied
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="ties the head"):
        check_model(folder, skeleton, tokenizer)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(9)])
    with pytest.raises(ModelError, match=r"ids up to \d+, and its embedding \d+ rows"):
        check_model(folder, skeleton, tokenizer)


@pytest.mark.full
def test_code_beside_a_model_does_not_reach_the_converter(tmp_path, tiny_model):
    base, folder = tmp_path / "base", tmp_path / "folder"
    shutil.copytree(tiny_model, base)
    folder.mkdir()
    (base / "modeling_x.py").write_text("raise SystemExit")
    link_model(base, folder, {}, False)
    assert not list(folder.glob("*.py")) and (folder / "config.json").is_file()


@pytest.mark.full
def test_an_adapter_of_other_scalings_is_written_with_one(tmp_path, tiny_model):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9},
    )  # fmt: skip
    folder = write_adapter(tiny_model, tmp_path / "adapter", config)
    plain = write_plain(folder, tmp_path / "plain", "base")
    ranks = {rank for _, rank, _ in plain.pairs.values()}
    assert len(ranks) == 1 and plain.alpha == ranks.pop()
    dora = write_adapter(tiny_model, tmp_path / "dora", peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ModelError, match=r"what=gguf-adapter: .*lora_magnitude_vector.*what=gguf writes"):
        write_plain(dora, tmp_path / "no", "base")


@pytest.mark.full
def test_an_adapter_that_does_not_fit_the_file_of_its_base_is_refused(tmp_path, shapes, vocabulary):
    import numpy as np
    from gguf import GGUFWriter

    base = write_model(tmp_path / "base.gguf", shapes, vocabulary)
    outputs, inputs = GgufFile(base).shapes["blk.0.attn_q.weight"]
    for width, fits in ((inputs, True), (inputs + 1, False)):
        file = tmp_path / f"{width}.gguf"
        writer = GGUFWriter(str(file), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        for end, size in ((".lora_a", (4, width)), (".lora_b", (outputs, 4))):
            writer.add_tensor(f"blk.0.attn_q.weight{end}", np.ones(size, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        pairs = {"model.layers.0.self_attn.q_proj": (width, 4, outputs)}
        if fits:
            assert verify_adapter(file, pairs, 4.0, base) == 2
            with pytest.raises(NumericsError, match="alpha"):
                verify_adapter(file, pairs, 8.0, base)
        else:
            with pytest.raises(ModelError, match=r"export\.gguf_base: .* does not fit"):
                verify_adapter(file, pairs, 4.0, base)


@pytest.mark.full
def test_without_a_network_one_message_says_where_the_converters_come_from(tmp_path, index, monkeypatch):  # noqa: F811
    """S10: an archive with another digest is not unpacked either."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"pip could not fetch llama-cpp-python.*export\.llama_cpp=FOLDER"):
        llama_cpp.converters(None, print)
    name = "llama_cpp_python-0.3.36"
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"{name}/PKG-INFO")
        text = b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n"
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    with pytest.raises(ModelError, match="is not the one that was verified"):
        llama_cpp.converters(None, print)
    assert not (tmp_path / "cache/llama.cpp/0.3.36").exists()


@pytest.mark.full
def test_a_checkout_of_ones_own_is_run_and_its_output_shown(tmp_path):
    with pytest.raises(ConfigError, match=r"export\.llama_cpp: .* has no convert_hf_to_gguf\.py"):
        llama_cpp.converters(str(tmp_path), print)
    (tmp_path / llama_cpp.ADAPTER).write_text("")
    (tmp_path / llama_cpp.MODEL).write_text(
        "import os, sys\nprint('HF_TOKEN' in os.environ, os.environ['HF_HUB_OFFLINE'], os.getcwd())\nsys.exit('unknown model')\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    folder = llama_cpp.converters(str(tmp_path), print)
    with pytest.raises(ModelError, match=rf"(?s)ended with 1.*False 1 {work}.*unknown model"):
        llama_cpp.convert(folder, llama_cpp.MODEL, [], work)


@pytest.mark.full
def test_the_converters_are_kept_where_only_this_user_writes():
    """S21: they are code that is run."""
    try:
        folder = llama_cpp.converters(None, print)
    except ModelError as error:
        pytest.skip(f"llama.cpp's converters are not here: {error}")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "gguf-py/gguf/vocab.py").is_file() and not (folder / "src").exists()
