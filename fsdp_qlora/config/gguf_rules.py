"""What `export` needs to write GGUF files (``what=gguf``, ``what=gguf-adapter``)."""

from __future__ import annotations

from collections.abc import Iterator

from fsdp_qlora.config.schema import RunConfig

TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
"""``export.gguf_type``: what llama.cpp's converter of models writes (``--outtype``)."""
_OWN = {"gguf_type": "f16", "gguf_base": None, "llama_cpp": None}
"""Settings of these exports alone, with their defaults."""


def gguf_needs(config: RunConfig) -> Iterator[str]:
    """Yield what keeps `export` from writing GGUF files, or settings of that without it."""
    what, export = config.what, config.export
    if what not in ("gguf", "gguf-adapter"):
        yield from (
            f"export.{key}: is about GGUF files; set what=gguf, or leave it out."
            for key, default in _OWN.items()
            if getattr(export, key) != default
        )
        return
    if not export.to:
        yield f"export.to: not set. Give the folder that what={what} writes."
    if isinstance(config.adapter, str) and export.checkpoint:
        yield "export.checkpoint: adapter names the adapter to export; give one of them."
    for key in ("for_vllm", "plain_lora"):
        if getattr(export, key):
            yield f"export.{key}: rewrites an adapter for other programs; leave it out with what={what}."
    if export.push:
        yield f"export.push: uploads no GGUF files; run `hf upload {export.push} FOLDER` on the folder of what={what}."
    if what == "gguf" and export.gguf_base is not None:
        yield "export.gguf_base: names the base of an adapter; set what=gguf-adapter, or leave it out."
    if export.gguf_type not in TYPES:
        kind = export.gguf_type
        yield (
            f"export.gguf_type: llama.cpp's converter writes {', '.join(TYPES)}, not {kind!r}. Its quantizer makes "
            f"others: export f16, then run `llama-quantize model-f16.gguf OUT.gguf {kind.upper()}`, or let Ollama do "
            f"it: `ollama create NAME -q {kind} -f Modelfile`."
        )
