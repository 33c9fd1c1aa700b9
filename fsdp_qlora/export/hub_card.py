"""The model card of what is pushed to the hub: the run's results, and how to use what is in the repository."""

from __future__ import annotations

import re

from fsdp_qlora.export.published import HubBase, without_paths

NOT_ON_HUB = "a model that is not on the hub"
_HERE = "path/to/this/folder"
_FIELD = re.compile(r"^base_model: (.*)\n", re.MULTILINE)
_RELATIONS = {"merged": "finetune", "served": "quantized", "base-4bit": "quantized"}
"""What the hub calls the relation of an export to its base."""
_SAYS = {
    "merged": "The base model with a fine-tuned adapter folded into its weights, in 16 bits.",
    "served": "The base model in 4 bits with a fine-tuned adapter beside it: `from_pretrained` loads both.",
    "base-4bit": "The base model with its linears in 4 bits (bitsandbytes).",
}
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```
"""


def adapter_card(card: str | None, repo: str, base: HubBase | None) -> str:
    """Return the card of an adapter's repository: the one that its run wrote, with names that others can use.

    Args:
        card: the README.md of its folder, if it has one.
        repo: the repository.
        base: its base; None: it is not on the hub.
    """
    if card is None:
        named = f"base_model: {base.id}\n" if base else ""
        on = f"`{base.id}`" if base else NOT_ON_HUB
        return f"---\n{named}library_name: peft\ntags: [fsdp_qlora]\n---\n\n# {repo}\n\nAn adapter for {on}.\n"
    if written := _FIELD.search(card):
        card = _FIELD.sub(f"base_model: {base.id}\n" if base else "", card, count=1)
        there = written[1].strip()
        card = card.replace(f"`{there}`", f"`{base.id}`" if base else NOT_ON_HUB)
        card = card.replace(f'"{there}"', _argument(base))
    return without_paths(card.replace(_HERE, repo))


def _argument(base: HubBase | None) -> str:
    """Return what to give to ``from_pretrained``."""
    if base is None:
        return '"path/to/the/base/model"'
    return f'"{base.id}", revision="{base.revision}"' if base.revision else f'"{base.id}"'


def model_card(what: str, repo: str, base: HubBase | None, adapter: str | None) -> str:
    """Return the card of a model's repository.

    Args:
        what: the export (``export what=``).
        repo: the repository.
        base: the base model; None: it is not on the hub.
        adapter: the card of the adapter in it, whose table of settings and results is taken over.
    """
    relation = _RELATIONS.get(what)
    front = [f"base_model: {base.id}", *([f"base_model_relation: {relation}"] if relation else [])] if base else []
    front += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [qlora, fsdp_qlora, {what}]"]
    named = f"`{base.id}`{f' at revision `{base.revision}`' if base.revision else ''}" if base else NOT_ON_HUB
    rows = [] if adapter is None else _rows(adapter)
    parts = ["---\n" + "\n".join(front) + "\n---", f"# {repo}", f"{_SAYS.get(what, what)} Made with fsdp_qlora."]
    parts += ["\n".join(["| | |", "|---|---|", f"| Base model | {named} |", *rows])]
    if what in _RELATIONS:
        parts += [_USE.format(repo=repo)]
    return "\n\n".join(parts) + "\n"


def _rows(card: str) -> list[str]:
    """Return the rows of a card's table, without its head and the base model."""
    rows = [line for line in without_paths(card).splitlines() if line.startswith("| ") and line != "| | |"]
    return [row for row in rows if not row.startswith("| Base model |")]
