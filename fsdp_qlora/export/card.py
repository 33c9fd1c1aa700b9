"""The adapter's model card: base, data, settings, results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsdp_qlora.adapters import LoRA, build_method
from fsdp_qlora.config.choices import WITH_DROPOUT
from fsdp_qlora.config.convert import build
from fsdp_qlora.config.schema import LoraSettings


def model_card(config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the text of an adapter's README.md.

    Args:
        config: the run's settings as nested dictionaries.
        facts: ``base_model``, ``train_rows``, ``steps``, ``trainable_parameters``, ``eval_loss_before``,
            ``eval_loss_after`` (either loss may be None), ``versions``.
    """
    lora_settings = build(LoraSettings, config["lora"])
    method = build_method(lora_settings.method)
    kind = "LoRA" if isinstance(method, LoRA) else f"PEFT {type(method).__name__}"
    settings = [*sorted(method.reads, reverse=True), *(["dropout"] if method.name in WITH_DROPOUT else [])]
    given = [f"{key}={config['lora'][key]}" for key in settings]
    given += [f"{key}={value}" for key, value in config["lora"]["options"].items()]
    quant, lora, train, optim = config["quant"], config["lora"], config["train"], config["optim"]
    stored = quant["name"] + (", double quantization" if quant["double_quant"] and quant["name"] != "none" else "")
    stored += "".join(f", {pattern} in {name}" for pattern, name in quant["overrides"].items())
    data = config["data"]["train"]
    sources = ", ".join(data) if isinstance(data, list) else str(data)
    return f"""---
base_model: {facts["base_model"]}
library_name: peft
pipeline_tag: text-generation
tags: [qlora, {kind.rsplit(maxsplit=1)[-1].lower()}, fsdp_qlora]
---

# {config["run"]["name"]}

A {kind} adapter, trained with fsdp_qlora.

| | |
|---|---|
| Base model | `{facts["base_model"]}` |
| Base precision in training | {stored}, compute in {config["precision"]["name"]} |
| Data | {sources} ({facts["train_rows"]} sequences) |
| {kind} | {", ".join([lora["variant"], *given])} |
| Adapted modules | {lora["target_modules"]}{_experts(lora)} |
| Trained parameters | {facts["trainable_parameters"]:,} |
| Steps | {facts["steps"]} of {train["global_batch_size"]} rows |
| Optimizer | {optim["name"]}, learning rate {optim["lr"]}, schedule {config["schedule"]["name"]} |
| Held-out loss before | {_loss(facts["eval_loss_before"])} |
| Held-out loss after | {_loss(facts["eval_loss_after"])} |
| Versions | {", ".join(f"{k} {v}" for k, v in facts["versions"].items())} |

{_start(lora_settings)}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{facts["base_model"]}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def _start(lora: LoraSettings) -> str:
    """Return what users of an adapter that started from the base weights must know."""
    if lora.start is None:
        return ""
    return (
        f"The adapter started from the base weights ({lora.start}), which were taken off the base before that was "
        "quantized. It needs such a base (`fsdp-qlora export what=base-4bit adapter=FOLDER`), or can be converted to a "
        "plain LoRA for the original one (`fsdp-qlora export adapter=FOLDER export.plain_lora=true`).\n\n"
    )


def _experts(lora: Mapping[str, Any]) -> str:
    """Name the stacked expert weights that have adapters."""
    parameters = lora["target_parameters"]
    if not parameters:
        return ""
    return f"; stacked weights: {parameters if isinstance(parameters, str) else ', '.join(parameters)}"


def _loss(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.4f}"
