"""How others train: a bare loop of transformers, PEFT and DDP, TRL, torchtune and Unsloth, by their public functions.

The base is bitsandbytes' (torchtune has one of its own). Where weights are drawn (`Spec.drawn`), the whole bf16 model
is drawn on the device and handed to `from_pretrained` as its ``state_dict``, which quantizes it module by module. TRL
and the bare loop attend over the whole row, also where it is made of documents: without flash-attn they cannot keep
these apart.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.drawn import DrawnWeights, in_memory, write_drawn
from benchmarks.step_rows import Rows
from benchmarks.step_spec import LINEARS, Known, Spec, Stepper, plain_loop
from fsdp_qlora.distributed.process import Placement


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device("cuda", Placement.from_env().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _peft(spec: Spec, attention: str) -> Any:
    """Return the bitsandbytes 4-bit base with PEFT's adapters, as their documentation shows."""
    from peft import LoraConfig, get_peft_model

    model = _base(spec, attention)
    config = LoraConfig(
        r=spec.r, lora_alpha=2 * spec.r, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _base(spec: Spec, attention: str) -> Any:
    """Return the quantized base; drawn weights take the memory of the bf16 model until they are quantized."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16 if spec.fsdp else torch.uint8,  # FSDP shards floating numbers only
        ),
        "dtype": torch.bfloat16, "attn_implementation": attention, "device_map": {"": str(device())},
    }  # fmt: skip
    if not spec.drawn:
        return AutoModelForCausalLM.from_pretrained(spec.model, **settings)
    source, config = DrawnWeights(Path(spec.model)), AutoConfig.from_pretrained(spec.model)
    weights = {name: source.whole(name) for name in source.entries}
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the auto class takes no model without a name
    return kind.from_pretrained(None, config=config, state_dict=weights, **settings)


@contextlib.contextmanager
def bare(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train with transformers, PEFT, DDP and torch's AdamW in a plain loop."""
    where = device()
    torch.distributed.init_process_group("gloo" if where.type == "cpu" else "nccl")
    model = _peft(spec, spec.attention)
    model.train()
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = DistributedDataParallel(model) if placement.world_size > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return wrapped(input_ids=ids.to(where), labels=labels.to(where), use_cache=False).loss

    try:
        yield plain_loop(trained, rows, spec, placement, loss), {}
    finally:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Turns:
    """Lets a peer that owns its loop train a step at a time: its loop runs in a thread of its own."""

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        import threading

        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ended, self._error = False, None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop: Callable[[Callable[[], None]], None]) -> None:
        try:
            loop(self._after_step)
        except BaseException as error:
            self._error = error
            self._done.release()
            raise

    def _after_step(self) -> None:
        self._done.release()
        self._go.acquire()

    def step(self) -> None:
        """Let the loop run until its next step is done."""
        if self._thread.is_alive():
            self._go.release()
        else:
            self._thread.start()
        self._done.acquire()
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def trl(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train with TRL's SFTTrainer, as its documentation shows: DDP, or with ``spec.fsdp`` accelerate's FSDP2."""
    from peft import LoraConfig
    from transformers import AutoTokenizer

    if spec.fsdp and device().type == "cpu":
        raise SystemExit("accelerate shards on accelerators only: on a CPU it makes DDP of TRL's FSDP2.")
    started = time.perf_counter()
    model = _base(spec, "sdpa")
    seconds = time.perf_counter() - started
    lora = LoraConfig(r=spec.r, lora_alpha=2 * spec.r, target_modules=LINEARS, task_type="CAUSAL_LM")
    with _sft(model, AutoTokenizer.from_pretrained(spec.model), spec, rows, lora) as step:
        yield step, {"load_seconds": seconds}


@contextlib.contextmanager
def _sft(model: Any, tokenizer: Any, spec: Spec, rows: Rows, lora: Any = None) -> Iterator[Stepper]:
    """Let TRL's SFTTrainer train ``model`` a step at a time; without ``lora`` it has its adapters already."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sharded: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "activation_checkpointing": spec.checkpointing},
    }
    dataset = Dataset.from_list([{"input_ids": a, "labels": b} for a, b in rows.lists()])
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, report_to=[], use_cpu=device().type == "cpu", bf16=True, max_length=None,
            max_steps=100_000,
            per_device_train_batch_size=spec.batch, learning_rate=2e-4, save_strategy="no",
            gradient_checkpointing=spec.checkpointing and not spec.fsdp, logging_strategy="no", disable_tqdm=True,
            optim="adamw_torch", **(sharded if spec.fsdp else {}),
        )  # fmt: skip

        class Pause(TrainerCallback):
            after_step: Callable[[], None]

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.after_step()

        pause = Pause()
        trainer = SFTTrainer(
            model, args=settings, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, callbacks=[pause]
        )

        def loop(after_step: Callable[[], None]) -> None:
            pause.after_step = after_step
            trainer.train()

        yield Turns(loop).step


@contextlib.contextmanager
def unsloth(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train with Unsloth and TRL's SFTTrainer, as Unsloth's documentation shows, by its two public functions.

    It loads from files and nothing else, so drawn weights are put into files in memory (/dev/shm) for that long.
    """
    from unsloth import FastLanguageModel
    from transformers import AutoTokenizer  # isort: skip - Unsloth comes first, to patch what it patches

    with tempfile.TemporaryDirectory(dir=in_memory() if spec.drawn else None) as scratch:
        folder = _as_files(Path(spec.model), Path(scratch)) if spec.drawn else Path(spec.model)
        started = time.perf_counter()
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder), max_seq_length=rows.length, dtype=torch.bfloat16, load_in_4bit=True
        )
        seconds = time.perf_counter() - started
    model = FastLanguageModel.get_peft_model(
        model, r=spec.r, lora_alpha=2 * spec.r, lora_dropout=0, bias="none", target_modules=LINEARS, random_state=0,
        use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
    )  # fmt: skip
    with _sft(model, AutoTokenizer.from_pretrained(spec.model), spec, rows) as step:
        yield step, {"load_seconds": seconds}


def _as_files(model: Path, folder: Path) -> Path:
    """Copy a folder with its drawn weights in files; return the copy."""
    for file in model.glob("*.json"):
        shutil.copy2(file, folder)
    write_drawn(DrawnWeights(model), folder)
    return folder


@contextlib.contextmanager
def torchtune(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train torchtune's QLoRA Mistral as its single-device recipe does: a plain loop around its model and its loss.

    Its weights are random as its builder makes them; its NF4 is torchao's, its adapters are bf16.
    """
    from torchtune.models.mistral import lora_mistral
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import set_activation_checkpointing, set_default_dtype
    from transformers import AutoConfig

    shape, where, started = AutoConfig.from_pretrained(spec.model), device(), time.perf_counter()
    if shape.model_type != "mistral":
        raise SystemExit(f"torchtune's way is written for Mistral, not for {shape.model_type}.")
    with set_default_dtype(torch.bfloat16), where:
        model = lora_mistral(
            ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=shape.vocab_size,
            num_layers=shape.num_hidden_layers, num_heads=shape.num_attention_heads,
            num_kv_heads=shape.num_key_value_heads, embed_dim=shape.hidden_size, max_seq_len=rows.length,
            intermediate_dim=shape.intermediate_size, lora_rank=spec.r, lora_alpha=2 * spec.r, quantize_base=True,
        )  # fmt: skip
    set_trainable_params(model, get_adapter_params(model))
    if spec.checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    seconds = time.perf_counter() - started
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=where.type != "cpu")
    number = 0

    def step() -> None:
        nonlocal number
        ids, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        loss(model(ids.to(where)), following.to(where)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield step, {"load_seconds": seconds}
