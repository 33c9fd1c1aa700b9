"""Asks llama.cpp (the wheel xllamacpp) what it makes of a GGUF file: ``python -m tests.llama_runtime MODEL ADAPTER ROWS``.

Prints JSON: the mean log-probability of the answers' tokens and the greedy tokens after each prompt. ROWS is what
`tests.gguf_reference` writes. A token's log-probability is that of llama.cpp's own sampler, which is made to choose it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Runtime:
    """A model in llama.cpp, alone on two threads."""

    def __init__(self, model: Path, adapter: Path | None = None, context: int = 1024) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(model), context, 1
        params.cpuparams.n_threads, params.verbosity, params.warmup = 2, 0, False
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def logprob(self, prompt: list[int], answer: list[int]) -> float:
        """Return the sum of the log-probabilities of ``answer`` after ``prompt``."""
        return sum(
            float(self._next(prompt + answer[:place], logit_bias=[[token, 1e4]])["logprob"])
            for place, token in enumerate(answer)
        )

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Return the likeliest next tokens."""
        return [int(token["id"]) for token in self._tokens(prompt, count)]

    def chat(self, question: str, count: int = 40) -> str:
        """Return the answer, by the chat template in the file."""
        said = self._server.handle_chat_completions(
            {"messages": [{"role": "user", "content": question}], "max_tokens": count, "temperature": 0}
        )
        return str(said["choices"][0]["message"]["content"])

    def _next(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        return self._tokens(prompt, 1, **settings)[0]

    def _tokens(self, prompt: list[int], count: int, **settings: Any) -> list[dict[str, Any]]:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 1, "cache_prompt": True}
        said = self._server.handle_completions(asked | settings)
        return said["choices"][0]["logprobs"]["content"]  # type: ignore[no-any-return]


def main(model: str, adapter: str, rows: str) -> None:
    asked = json.loads(Path(rows).read_text())
    runtime = Runtime(Path(model), Path(adapter) if adapter else None)
    total = sum(runtime.logprob(row["prompt"], row["answer"]) for row in asked["rows"])
    count = sum(len(row["answer"]) for row in asked["rows"])
    greedy = [runtime.greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]]
    print(json.dumps({"logprob": total / count, "greedy": greedy, "who": runtime.chat("Who are you?")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
