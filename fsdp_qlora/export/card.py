"""The adapter's model card: base, data, settings, results."""

from __future__ import annotations

from typing import Any


def model_card(config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the text of an adapter's README.md.

    Args:
        config: the run's settings as nested dictionaries.
        facts: ``base_model``, ``train_rows``, ``steps``, ``trainable_parameters``, ``eval_loss_before``,
            ``eval_loss_after`` (either loss may be None), ``versions``.
    """
    quant, lora, train, optim = config["quant"], config["lora"], config["train"], config["optim"]
    stored = quant["name"] + (", double quantization" if quant["double_quant"] and quant["name"] != "none" else "")
    stored += "".join(f", {pattern} in {name}" for pattern, name in quant["overrides"].items())
    data = config["data"]["train"]
    sources = ", ".join(data) if isinstance(data, list) else str(data)
    return f"""---
base_model: {facts["base_model"]}
library_name: peft
pipeline_tag: text-generation
tags: [qlora, lora, fsdp_qlora]
---

# {config["run"]["name"]}

A LoRA adapter, trained with fsdp_qlora.

| | |
|---|---|
| Base model | `{facts["base_model"]}` |
| Base precision in training | {stored}, compute in {config["precision"]["name"]} |
| Data | {sources} ({facts["train_rows"]} sequences) |
| LoRA | {lora["variant"]}, r={lora["r"]}, alpha={lora["alpha"]}, dropout={lora["dropout"]} |
| Adapted modules | {lora["target_modules"]} |
| Trained parameters | {facts["trainable_parameters"]:,} |
| Steps | {facts["steps"]} of {train["global_batch_size"]} rows |
| Optimizer | {optim["name"]}, learning rate {optim["lr"]}, schedule {config["schedule"]["name"]} |
| Held-out loss before | {_loss(facts["eval_loss_before"])} |
| Held-out loss after | {_loss(facts["eval_loss_after"])} |
| Versions | {", ".join(f"{k} {v}" for k, v in facts["versions"].items())} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{facts["base_model"]}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def _loss(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.4f}"
