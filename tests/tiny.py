"""Tiny random models and data, made on the spot: the real code paths in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "small",
    "ships",
    "sail",
    "home",
    "under",
    "grey",
    "skies",
]


def sentence(number: int, words: int) -> str:
    """Return some words that depend on ``number``."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words))


def make_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE on a few sentences and save it; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([sentence(n, 12) for n in range(50)] + ["user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)


def make_model(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **settings: Any) -> Path:
    """Save a random bf16 Llama with its tokenizer into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return _save_llama(folder, make_tokenizer(folder), seed, max_shard_size, **settings)


def _save_llama(folder: Path, vocab: int, seed: int = 0, max_shard_size: str = "5GB", **settings: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2,
    } | settings  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(str(folder), max_shard_size=max_shard_size)
    return folder


def make_base_model(folder: Path, spare: int = 0, **settings: Any) -> Path:
    """Save a random Llama whose tokenizer has no chat tokens and no template; its embedding has ``spare`` rows more."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    core: Any = AutoTokenizer.from_pretrained(str(folder))
    state = json.loads(core.backend_tokenizer.to_str())
    chat = ("<|im_start|>", "<|im_end|>")  # ids 1 and 2: ordinary words take their places
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in chat]
    vocabulary = {word: place for word, place in state["model"]["vocab"].items() if word not in chat}
    state["model"]["vocab"] = {
        word: number for number, word in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "chat_template.jinja").unlink()
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names).save_pretrained(str(folder))
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    return _save_llama(folder, len(vocabulary) + spare, **ends, **settings)


def make_packed(folder: Path, target: Path, name: str = "nf4", double_quant: bool = True, **settings: Any) -> Path:
    """Save the model in ``folder`` as transformers and bitsandbytes quantize it, with its tokenizer."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = {
        "load_in_4bit": True, "bnb_4bit_quant_type": name, "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    } | settings  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mean of the statistics depends on it
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**asked), dtype=torch.bfloat16, device_map="cpu"
    )
    torch.set_num_threads(threads)
    model.save_pretrained(str(target))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / file, target / file)
    return target


def write_chat_rows(file: Path, count: int = 48) -> Path:
    """Write ``count`` conversations of uneven length as JSONL."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}: " + sentence(n, 2 + n % 6)},
                {"role": "assistant", "content": sentence(n + 1, 3 + (n * 5) % 17)},
            ]
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def poison(folder: Path, name: str, index: tuple[int, ...], value: float = float("nan")) -> None:
    """Write ``value`` into one element of a tensor of the model in ``folder`` (one file)."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][index] = value
    save_file(tensors, file, metadata={"format": "pt"})


def poisoned(tiny_model: Path, chat_rows: Path, folder: Path) -> tuple[Path, Path, int]:
    """Return a model that makes NaN of one token (0 / 0 in its first norm), rows of which one has it, its number."""
    import shutil

    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny_model, folder / "poisoned"))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    (token,) = tokenizer("§", add_special_tokens=False)["input_ids"][-1:]
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[2] = embedding[1]  # the padding's row is zero, too
    embedding[token] = 0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.0}))
    rows = chat_rows.read_text().splitlines()
    bad = 29
    rows[bad] = json.dumps({"messages": [{"role": "user", "content": "§"}, {"role": "assistant", "content": "fox"}]})
    file = folder / "poisoned.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return model, file, bad
