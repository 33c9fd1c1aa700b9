"""Which section of docs/troubleshooting.md is about a message. Imports no torch.

A message is recognised by its words, not by the place that raised it: what ends a run may come from torch, from the
operating system, or as text from another rank (`run/exit.py`), where no exception of ours is left to carry a section.
tests/unit/test_troubleshooting.py holds the words to the code that says them, and the sections to the page.
"""

from __future__ import annotations

from fsdp_qlora.shown import visible

PAGE = "docs/troubleshooting.md"

SECTIONS: dict[str, tuple[str, ...]] = {
    "out-of-memory": ("out of memory on", "OutOfMemoryError"),
    "a-rank-was-killed": ("was killed by", "the ranks exited without reporting an error"),
    "ranks-that-hang": ("is stuck in", "never reached", "all ranks are stuck", "cannot reach the other ranks"),
    "a-port-is-in-use": ("address already in use",),
    "no-space-left": (
        "No space left on device", "Disk quota exceeded", "MB are free there", "no space left on the disk",
    ),
    "ranks-that-differ": (
        "was started with different settings from rank 0", "their machines have different libraries",
    ),
    "the-model-cannot-be-opened": (
        "is not a local folder, and the hub", "is not a transformers model folder", "model.name: there is no folder",
        "has no *.safetensors file", "weight files are missing", "can only be built by Python code",
        "ownload the model again", "ownload it again", "not in the local hub cache", "has no usable tokenizer",
        "only bitsandbytes' 4-bit form can be read",
    ),
    "the-model-is-refused": (
        "would not match its own code in transformers", "cannot be compared with its upstream code",
        "of the weights of layers and linears would stay in 16 bits",
    ),
    "the-data-cannot-be-read": (
        "data: there is no file", "data: no file matches", "unknown file type", "holds no data", "did not provide its",
        "has several configurations", "is a Git LFS pointer", "the server answered",
    ),
    "nothing-to-learn-from": ("has a supervised token to learn from",),
    "chat-templates": ("chat template",),
    "a-row-is-refused": ("data.on_bad_row=skip", "data.columns can map other names"),
    "the-loss-is-not-a-number": ("the parameters were not updated", "rollback found no checkpoint of this run"),
    "a-resume-is-refused": (
        "was made with different settings", "was made with a different base model", "holds an unfinished run",
        "no checkpoint of this run is valid", "is not the file that", "is in use by",
    ),
    "the-adapter-does-not-fit": (
        "was trained on another base than", "was trained with another vocabulary than", "does not fit this base model",
        "is not of this base, or of another rank", "it is not a PEFT adapter folder",
    ),
    "an-export-is-refused": (
        "is certain to be served right by vLLM", "what=gguf", "what=merged makes a model",
        "export the adapter (what=adapter)", "choose another folder, or set export.overwrite",
        "is not empty and no earlier", "export.push:",
    ),
    "sweeps": (
        "so torchrun cannot start them", "no key has several values", "an interval has no list of values",
        "another sweep is running in",
    ),
}  # fmt: skip
"""Anchor of a section -> words of the messages that it is about; the first that has them is shown."""

NOT_OURS = ("OutOfMemoryError", "address already in use", "No space left on device", "Disk quota exceeded")
"""Words of torch and of the operating system."""


def section_of(message: str) -> str | None:
    """Return the anchor of the section about a message, or None if there is none."""
    return next((name for name, words in SECTIONS.items() if any(word in message for word in words)), None)


def printed(message: str) -> str:
    """Return a message as it is printed where a process ends: on the same line, its last words name the section."""
    section, shown = section_of(message), visible(message)
    if section is None:
        return shown
    return f"{shown}{'' if shown.endswith(('.', '!', '?', ')')) else '.'} See {PAGE}#{section}"
