"""`export what=gguf` and `what=gguf-adapter`: files for llama.cpp and Ollama, made by llama.cpp's own converters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.export import llama_cpp, ollama
from fsdp_qlora.export.gguf import settle_tokens, verify_adapter, verify_model
from fsdp_qlora.export.gguf_adapter import require_fits, write_plain
from fsdp_qlora.export.gguf_source import (
    Vocabulary,
    check_model,
    drop_code,
    link_model,
    read_vocabulary,
    state_begin,
)
from fsdp_qlora.export.model_folder import GGUF, keep_template, new_folder, of_tokenizer, put, require_free
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.files.write import write_json, write_text
from fsdp_qlora.inference.end_of_turn import EndOfTurn, end_of_turn
from fsdp_qlora.inference.rendering import render_all_apart
from fsdp_qlora.model.folder import needs_hub, resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.model.tokenizer import build_tokenizer
from fsdp_qlora.run.inference import with_adapter
from fsdp_qlora.run.merge import Merge, merge
from fsdp_qlora.run.world import World

MODELFILE = "Modelfile"
ADAPTER_FILE = "adapter.gguf"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A GGUF file."""

    name: str
    num_bytes: int
    tensors: int


@dataclass(frozen=True)
class GgufExport:
    """What was written."""

    files: list[Written]
    merge: Merge | None
    """How the adapter was folded in, if it was."""
    notes: list[str]
    """What Ollama does otherwise than the model's chat template."""


@dataclass(frozen=True)
class _Speech:
    """How a model is spoken to."""

    vocabulary: Vocabulary
    turns: ollama.Turns | None
    stops: list[str]
    notes: list[str]


def export_gguf(
    config: RunConfig, adapter: Path | None, source: Path | None, target: Path, world: World, say: Say
) -> GgufExport:  # fmt: skip
    """Write a model in GGUF and a Modelfile into ``target``. Call it in one process.

    Args:
        config: the settings of the run that trained the adapter.
        adapter: a PEFT adapter folder, to be folded in as `run.merge.merge` does it.
        source: without an adapter, the model's folder.
        target: a folder that does not exist yet or is empty; with ``export.overwrite``, an earlier such export.
        world: one rank.
        say: told what takes time.

    Raises:
        ConfigError: if a package or llama.cpp's converters are missing.
        ModelError: if the model is one that cannot be converted, or ``target`` is not empty.
        NumericsError: if the file is not the model.
    """

    def fill(staging: Path, work: Path, converters: Path) -> GgufExport:
        folder, done = work / "model", None
        if adapter is not None:
            done = merge(config, adapter, folder, world)
            if not config.model.trust_remote_code:
                drop_code(folder)
        else:
            assert source is not None
            folder.mkdir()
            link_model(source, folder, {}, config.model.trust_remote_code)
        name = Path(done.base if done else config.run.name).name
        written, speech = _model(config, folder, staging, "model", name, converters, say)
        _modelfile(staging, f"./{written.name}", None, speech)
        return GgufExport([written], done, speech.notes)

    kept = [folder for folder in (adapter, source) if folder is not None]
    return _export(config, target, kept, fill, say)


def export_gguf_adapter(config: RunConfig, adapter: Path, target: Path, say: Say) -> GgufExport:
    """Write an adapter in GGUF, and a Modelfile that puts it on its base model, into ``target``.

    Args:
        config: names the base model, unless the adapter does.
        adapter: a PEFT adapter folder.
        target: as for `export_gguf`.
        say: told what takes time.

    Raises:
        ConfigError: if a package or llama.cpp's converters are missing.
        ModelError: if llama.cpp cannot compute such an adapter, it does not fit its base, or ``target`` is not
            empty.
        NumericsError: if a file is not what it was made of.
    """
    config = with_adapter(config, adapter)
    base = resolve_folder(config.model.name, config.model.revision)
    trusted, named = config.model.trust_remote_code, config.export.gguf_base

    def fill(staging: Path, work: Path, converters: Path) -> GgufExport:
        name = Path(config.model.name).name
        lora = write_plain(adapter, work / f"{name}-lora", config.model.name if needs_hub(config.model.name) else name)
        folder = work / "base"
        folder.mkdir()
        link_model(base, folder, of_tokenizer(adapter), trusted)
        keep_template(folder, adapter)
        skeleton = build_skeleton(folder, torch.bfloat16, "eager", trusted)
        require_fits(lora, adapter, read_shapes(skeleton).linears)
        files: list[Written] = []
        if named is None:
            written, speech = _model(config, folder, staging, "base", name, converters, say)
            files.append(written)
            weights, base_file = f"./{written.name}", staging / written.name
        else:
            speech = _speech(folder, skeleton.config, build_tokenizer(folder, trusted))
            base_file = _base_file(named)
            weights = str(base_file.absolute()) if base_file else named
        say("converting the adapter")
        llama_cpp.convert(
            converters, llama_cpp.ADAPTER,
            [lora.folder, "--base", folder, "--outfile", ADAPTER_FILE, "--outtype", "f32"], staging,
        )  # fmt: skip
        file = staging / ADAPTER_FILE
        tensors = verify_adapter(file, lora.pairs, lora.alpha, base_file)
        _modelfile(staging, weights, f"./{ADAPTER_FILE}", speech)
        return GgufExport([*files, Written(ADAPTER_FILE, file.stat().st_size, tensors)], None, speech.notes)

    return _export(config, target, [adapter, base], fill, say)


def _base_file(named: str) -> Path | None:
    """Return the file that ``export.gguf_base`` names; None if it is a model in Ollama."""
    file = Path(named).expanduser()
    if file.is_file():
        return file
    if named.startswith((".", "/", "~")) or file.suffix == ".gguf":
        raise ConfigError(f"export.gguf_base: there is no file {named}; give a GGUF file, or Ollama's name of a model.")
    return None


def _export(
    config: RunConfig, target: Path, kept: list[Path], fill: Callable[[Path, Path, Path], GgufExport], say: Say
) -> GgufExport:  # fmt: skip
    """Fill a new folder next to ``target``, and move it there."""
    llama_cpp.require_packages()
    overwrite = config.export.overwrite
    require_free(target, GGUF, overwrite, kept)
    converters = llama_cpp.converters(config.export.llama_cpp, say)
    with new_folder(target, partial(put, overwrite=overwrite)) as staging:
        work = staging / "work"
        work.mkdir()
        done = fill(staging, work, converters)
        shutil.rmtree(work)
        files = {
            file.name: {"tensors": file.tensors, "sha256": file_sha256(staging / file.name)} for file in done.files
        }
        own = "a checkout of llama.cpp"
        write_json(
            staging / GGUF.mark, {"converter": own if config.export.llama_cpp else llama_cpp.PACKAGE, "files": files}
        )
    return done


def _model(
    config: RunConfig, folder: Path, staging: Path, stem: str, name: str, converters: Path, say: Say
) -> tuple[Written, _Speech]:  # fmt: skip
    """Check and convert the model in ``folder``, and verify the result."""
    trusted, kind = config.model.trust_remote_code, config.export.gguf_type
    tokenizer = build_tokenizer(folder, trusted)
    skeleton = build_skeleton(folder, torch.bfloat16, "eager", trusted)
    shapes = check_model(folder, skeleton, tokenizer)
    speech = _speech(folder, skeleton.config, tokenizer)
    if speech.vocabulary.tokenizer_adds:
        state_begin(folder)
    file = staging / f"{stem}-{kind}.gguf"
    say(f"converting {name} to {kind}")
    llama_cpp.convert(
        converters, llama_cpp.MODEL, [folder, "--outfile", file.name, "--outtype", kind, "--model-name", name], staging
    )
    settle_tokens(file, speech.vocabulary)
    tensors = verify_model(file, shapes, speech.vocabulary)
    return Written(file.name, file.stat().st_size, tensors), speech


def _speech(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> _Speech:
    """Find out how the model in ``folder`` is spoken to."""
    end = end_of_turn(folder, config, tokenizer)
    first = end.ids[0] if end.ids else None
    if not tokenizer.chat_template:
        note = "There is no chat template: the model goes on with a text."
        return _Speech(read_vocabulary(tokenizer, first, None), None, _stops(tokenizer, end), [note])
    plain, prompted = _rendered(tokenizer, ollama.PROBES)
    begin = str(tokenizer.bos_token or "")
    vocabulary = read_vocabulary(tokenizer, first, bool(begin) and plain[0].startswith(begin))
    turns, notes = _turns(tokenizer, plain, prompted, begin if vocabulary.adds_begin else "")
    return _Speech(vocabulary, turns, _stops(tokenizer, end), notes)


def _turns(
    tokenizer: PreTrainedTokenizerBase, plain: list[str], prompted: list[str], begin: str
) -> tuple[ollama.Turns | None, list[str]]:  # fmt: skip
    """Return the chat template for Ollama, and what it lacks."""
    turns = None if "strftime_now" in str(tokenizer.chat_template) else ollama.read_turns(plain, prompted, begin)
    if turns is None:
        return None, ["The chat template does more than Ollama's can be made to do; Ollama looks for one like it."]
    notes = ["Tools are left out of the chat template."] if "tools" in str(tokenizer.chat_template) else []
    try:
        after_system = _rendered(tokenizer, [(ollama.SYSTEM, *probe) for probe in ollama.PROBES])
        whole = ollama.with_system(turns, *after_system, begin)
    except ModelError:  # it takes no system message
        whole = None
    if whole is None:
        notes.append("System messages are left out: the chat template does not write them as messages of their own.")
    return whole or turns, notes


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Sequence[ollama.Message]],
) -> tuple[list[str], list[str]]:
    conversations = [[dict(message) for message in probe] for probe in probes]
    plain = render_all_apart(tokenizer, conversations)
    return plain, render_all_apart(tokenizer, conversations, add_generation_prompt=True)


def _stops(tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> list[str]:
    tokens = [token for token in tokenizer.convert_ids_to_tokens(end.ids) if isinstance(token, str)]
    return list(dict.fromkeys([*tokens, *([end.text] if end.text else [])]))


def _modelfile(staging: Path, weights: str, adapter: str | None, speech: _Speech) -> None:
    write_text(
        staging / MODELFILE,
        ollama.modelfile(
            weights, adapter, speech.turns, speech.stops, ["ollama create NAME -f Modelfile", *speech.notes]
        ),
    )
