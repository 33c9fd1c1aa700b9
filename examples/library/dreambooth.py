"""DreamBooth (https://arxiv.org/abs/2208.12242) on a 4-bit UNet or transformer of diffusers, sharded over the ranks.

    pip install 'fsdp-qlora[diffusion]'
    torchrun --nproc-per-node 2 examples/library/dreambooth.py PIPELINE/unet ROWS.safetensors OUT_FOLDER

The model is diffusers', the loop is this file's, and between them are calls of the library: each rank reads and
quantizes its own rows of the weights, adapters go on every quantized linear, and checkpoints resume on any number of
ranks. The same command goes on from the newest one.

ROWS.safetensors holds `instance` and `prior`, latents `[images, channels, height, width]` of the subject and of other
members of its class, and `instance_prompt` and `prior_prompt`, embeddings `[tokens, width]` of "a photo of sks dog" and
"a photo of a dog"; `encode_images.py` writes it.
"""

import argparse
import json
import math
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fsdp_qlora import (
    Checkpointer,
    OptimSettings,
    Placement,
    Progress,
    Ranks,
    Resume,
    SafetensorsFolder,
    ShardedOptimizer,
    Snapshot,
    all_sum,
    attach_lora,
    build_format,
    build_ranks,
    checkpoint_tensors,
    deal,
    export_adapter,
    gather_adapter,
    gather_json,
    initialize_adapters,
    mixed_precision,
    optimizer_shapes,
    parameters_on_meta,
    process_group,
    replaceable_linears,
    seed_of,
    shard_model,
    short_targets,
    stream_weights,
    swap_linears,
    synchronize_gradients,
    trainable_parameters,
)

Rows = dict[str, torch.Tensor]


def load(asked: argparse.Namespace, ranks: Ranks) -> tuple[nn.Module, list[str]]:
    """Return the model, 4-bit, adapted, sharded and filled, and the names of the linears with adapters."""
    with parameters_on_meta():
        base = diffusers.AutoModel.from_config(asked.model).requires_grad_(False)
    if asked.precision == "bf16" and getattr(base, "_keep_in_fp32_modules", None):
        raise SystemExit(f"{asked.model}: diffusers keeps some of its modules in float32; add --precision fp32.")
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if asked.precision == "bf16" else torch.float32)
    lists = [child for child in base.children() if isinstance(child, nn.ModuleList)]  # down_blocks, transformer_blocks
    blocks = [block for each in lists for block in each]
    blocks += [base.mid_block] if getattr(base, "mid_block", None) is not None else []
    names = tuple(f"{name}." for name, module in base.named_modules() if module in blocks)
    linears = [linear for linear in replaceable_linears(base) if linear.name.startswith(names)]
    targets = [linear.name for linear in linears]
    swap_linears(base, linears, build_format("nf4"))
    model = attach_lora(base, targets, asked.lora_r, asked.lora_alpha, task_type=None)
    shard_model(model, [[block] for block in blocks], ranks, mixed_precision(asked.precision))
    report = stream_weights(model, base, SafetensorsFolder(Path(asked.model)), ranks)
    initialize_adapters(model, asked.seed, ranks.shard_rank, ranks.shard_size)
    for rank, (read, held) in enumerate(gather_json([report.bytes_read, report.quantized_bytes], ranks)):
        if ranks.is_main:
            print(f"rank {rank}: read {read:,} bytes of {report.file_bytes:,}, holds {held:,} in 4-bit")
    return model, targets


def pair_loss(
    model: nn.Module, scheduler: diffusers.DDPMScheduler, rows: Rows, number: int, weight: float
) -> torch.Tensor:
    """Return the loss of an image of the subject plus ``weight`` times that of one of its class, drawing on the CPU."""
    images = [rows[kind][number % len(rows[kind])] for kind in ("instance", "prior")]
    latents, prompts = torch.stack(images), torch.stack([rows["instance_prompt"], rows["prior_prompt"]])
    noise = torch.randn(latents.shape).to(latents)
    times = torch.randint(scheduler.config.num_train_timesteps, (2,)).to(latents.device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, times) if velocity else noise
    more = {"resolution": None, "aspect_ratio": None}  # PixArt's transformer asks for them; a UNet reads past them
    predicted = model(
        scheduler.add_noise(latents, noise, times), timestep=times, encoder_hidden_states=prompts,
        added_cond_kwargs=more, return_dict=False,
    )[0][:, : latents.shape[1]].float()  # some predict a variance after the noise  # fmt: skip
    instance, prior = (predicted - target).square().flatten(1).mean(1)
    return instance + weight * prior


def train(asked: argparse.Namespace, model: nn.Module, rows: Rows, ranks: Ranks) -> list[float]:
    """Train to the last step, from the newest checkpoint if there is one; return the losses of the steps run."""
    configs = Path(asked.model).parent / "scheduler"
    scheduler = diffusers.DDPMScheduler.from_pretrained(configs) if configs.is_dir() else diffusers.DDPMScheduler()
    optimizer = ShardedOptimizer(trainable_parameters(model), OptimSettings(lr=asked.lr))
    checkpointer = Checkpointer(Path(asked.out) / "checkpoints", ranks)
    identity = {key: value for key, value in vars(asked).items() if key not in ("out", "steps", "save_every")}

    def tensors() -> dict[str, torch.Tensor]:
        return checkpoint_tensors(optimizer.parameters.items(), optimizer)

    first, losses = 0, []
    if (saved := checkpointer.find(Resume.of("auto"), identity)) is not None:
        first = saved.manifest.step
        state = optimizer.load_state(first, optimizer_shapes(saved.manifest.tensors))
        checkpointer.load(saved, checkpoint_tensors(optimizer.parameters.items(), state))
        state.finish()
    turns = deal(asked.batch_size, ranks.data_rank, ranks.data_size)
    for step in range(first, asked.steps):
        total = 0.0
        for turn, item in enumerate(turns):
            synchronize_gradients(model, turn == len(turns) - 1)
            number = step * asked.batch_size + (item or 0)
            torch.manual_seed(seed_of(asked.seed, number))  # what is drawn depends on the rows, not on the rank
            share = 0.0 if item is None else 1 / asked.batch_size  # None: the others have one more
            loss = pair_loss(model, scheduler, rows, number, asked.prior_weight) * share
            loss.backward()
            total += loss.item()
        loss_sum, squares = all_sum([total, optimizer.grad_square_sum(ranks)], ranks)
        checkpointer.before_update()
        optimizer.step(asked.lr, min(1.0, 1.0 / (math.sqrt(squares) + 1e-6)))  # clipped to a norm of 1
        losses.append(loss_sum)
        if (step + 1) % asked.save_every == 0:
            checkpointer.save(Snapshot(step + 1, Progress(step=step + 1).to_dict(), identity, {}), tensors)
    checkpointer.close()
    return losses


def export(asked: argparse.Namespace, model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    """Write the adapter as PEFT's folder, and as the file that `pipeline.load_lora_weights` reads."""
    adapter = gather_adapter(model)
    if not ranks.is_main:
        return
    config, base = model.peft_config["default"], model.get_base_model()
    config.target_modules = short_targets(targets, base)
    export_adapter(Path(asked.out) / "adapter", adapter, config, str(asked.model))
    part = "unet" if isinstance(base, diffusers.UNet2DConditionModel) else "transformer"
    facts = {"r": asked.lora_r, "lora_alpha": asked.lora_alpha, "target_modules": config.target_modules}
    header = json.dumps({f"{part}.{key}": value for key, value in facts.items()})
    save_file(
        {f"{part}.{name.removeprefix('base_model.model.')}": tensor for name, tensor in adapter.items()},
        Path(asked.out) / "pytorch_lora_weights.safetensors", {"format": "pt", "lora_adapter_metadata": header},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="DreamBooth on a 4-bit model of diffusers.")
    parser.add_argument("model", help="folder of the UNet or transformer: config.json, safetensors")
    parser.add_argument("rows", help="safetensors file with latents and embedded prompts")
    parser.add_argument("out", help="folder for checkpoints and the adapter")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs a step, over all ranks")
    parser.add_argument("--prior-weight", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--lora-alpha", type=int, default=16)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    asked, placement = parser.parse_args(), Placement.from_env()
    device = torch.device("cuda", placement.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    with process_group(device, placement, timeout_seconds=600) as group:
        ranks = build_ranks(group, device)
        model, targets = load(asked, ranks)
        rows = {name: tensor.float().to(device) for name, tensor in load_file(asked.rows).items()}
        losses = train(asked, model, rows, ranks)
        export(asked, model, targets, ranks)
        if ranks.is_main:
            (Path(asked.out) / "losses.json").write_text(json.dumps(losses))
            print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "nothing left to do")


if __name__ == "__main__":
    main()
