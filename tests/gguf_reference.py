"""What a run's model says of held-out answers: ``python -m tests.gguf_reference RUN ROWS [DATA]``.

With DATA, of the base in 4 bits with the run's adapter, by this package; writes ROWS for `tests.llama_runtime`, of DATA.
Without it, of the base in 16 bits with the adapter, by plain PEFT. Prints what `tests.llama_runtime` prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.schema import LauncherSettings, PrecisionSettings, RunConfig
from fsdp_qlora.inference.generate import encode_conversations
from fsdp_qlora.run.inference import load_for_inference

NUM_ROWS, NUM_PROMPTS, ANSWER_TOKENS, GREEDY_TOKENS = 200, 20, 24, 16


def write_rows(tokenizer: Any, data: Path, file: Path) -> None:
    """Write the last rows of ``data``: a run reads it from the beginning.

    Only answers in ASCII: llama.cpp says nothing of a token that ends within a character.
    """
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    taken = [line for line in reversed(lines) if not line["input"] and line["output"].isascii()][:NUM_ROWS]
    prompts = encode_conversations(tokenizer, [[{"role": "user", "content": line["instruction"]}] for line in taken])
    answers = [tokenizer(line["output"], add_special_tokens=False)["input_ids"][:ANSWER_TOKENS] for line in taken]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    file.write_text(json.dumps({"rows": rows, "prompts": prompts[:NUM_PROMPTS], "tokens": GREEDY_TOKENS}))


@torch.no_grad()
def score(tokenizer: Any, asked: Any, logits: Callable[..., Any], generate: Callable[..., Any]) -> dict[str, Any]:
    def greedy(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return out[0, len(prompt) :].tolist()

    total = 0.0
    for row in asked["rows"]:
        ids = torch.tensor([row["prompt"] + row["answer"]])
        logprobs = logits(ids)[0, len(row["prompt"]) - 1 : -1].float().log_softmax(-1)
        total += float(logprobs.gather(1, torch.tensor(row["answer"])[:, None]).sum())
    count = sum(len(row["answer"]) for row in asked["rows"])
    (who,) = encode_conversations(tokenizer, [[{"role": "user", "content": "Who are you?"}]])
    return {
        "logprob": total / count,
        "greedy": [greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]],
        "who": tokenizer.decode(greedy(who, 40), skip_special_tokens=True),
    }


def main(run: str, rows: str, data: str = "") -> None:
    config = replace(
        RunConfig.load(run), launcher=LauncherSettings(device="cpu", nproc_per_node=1),
        precision=PrecisionSettings(name="fp32"),  # llama.cpp does not round to bf16 between operations
    )  # fmt: skip
    adapter = Path(run) / "adapter"
    if data:
        prepared = load_for_inference(config, adapter)
        write_rows(prepared.tokenizer, Path(data), Path(rows))
        tokenizer, logits, generate = prepared.tokenizer, prepared.model.logits, prepared.model.generate
    else:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
        model, tokenizer = PeftModel.from_pretrained(base, str(adapter)).eval(), AutoTokenizer.from_pretrained(adapter)
        logits, generate = lambda ids: model(input_ids=ids).logits, model.generate
    print(json.dumps(score(tokenizer, json.loads(Path(rows).read_text()), logits, generate)))


if __name__ == "__main__":
    main(*sys.argv[1:])
