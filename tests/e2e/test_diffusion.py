"""DreamBooth by examples/library/dreambooth.py equals diffusers' and PEFT's own code on a dense rounded copy.

Needs the extra ``diffusion``, which `make setup` does not install.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fsdp_qlora import initialize_adapters, seed_of
from tests.e2e.test_examples import EXAMPLES, TORCHRUN, numbers, run
from tests.tolerances import FP32_LOSSES, close
from tests.upstream import randomize, round_to_nf4

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
pytestmark = [pytest.mark.launch, pytest.mark.full, pytest.mark.timeout(1800)]

STEPS, PAIRS, WEIGHT, LR, R, ALPHA = 20, 3, 0.7, 2e-3, 4, 6
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.")
SETTINGS = [f"--batch-size={PAIRS}", f"--prior-weight={WEIGHT}", f"--lr={LR}", f"--lora-r={R}", f"--lora-alpha={ALPHA}"]
SETTINGS += ["--precision=fp32", "--save-every=10"]
PARTS: dict[str, Any] = {
    "unet": lambda: diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 128), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "transformer": lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=2, cross_attention_dim=256, sample_size=8,
        caption_channels=32,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=PARTS)
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model, as in a pipeline: with a scheduler beside it, and rows."""
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    torch.manual_seed(0)
    model = PARTS[request.param]()
    randomize(model)
    model.save_pretrained(folder)
    kind = "v_prediction" if request.param == "transformer" else "epsilon"
    diffusers.DDPMScheduler(prediction_type=kind).save_pretrained(folder.parent / "scheduler")
    latents = {"instance": torch.randn(3, 4, 8, 8), "prior": torch.randn(4, 4, 8, 8)}
    prompts = {"instance_prompt": torch.randn(5, 32), "prior_prompt": torch.randn(5, 32)}
    save_file(latents | prompts, folder.parent / "rows.safetensors")
    return folder


def dreambooth(
    part: Path, out: Path, num_ranks: int, env: dict[str, str], steps: int = STEPS, rows: Path | None = None
) -> str:
    start = TORCHRUN if num_ranks == 2 else [sys.executable]
    script = str(EXAMPLES / "library" / "dreambooth.py")
    rows = rows or part.parent / "rows.safetensors"
    return run(
        [*start, script, str(part), str(rows), str(out), f"--steps={steps}", *SETTINGS], env, part.parent, timeout=900
    )


@pytest.fixture(scope="module")
def alone(part: Path, cli_env: dict[str, str]) -> tuple[Path, str]:
    """What one rank writes, and what it prints."""
    out = part.parent / "alone"
    return out, dreambooth(part, out, 1, cli_env)


def rounded(part: Path) -> nn.Module:
    """Return diffusers' own model, its linears in the blocks rounded by bitsandbytes."""
    model = diffusers.AutoModel.from_pretrained(str(part)).requires_grad_(False).eval()
    round_to_nf4(model, [f"{name}.weight" for name in linears(model)])
    return model


def linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(BLOCKS)]


def predict(model: nn.Module, rows: dict[str, torch.Tensor], noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    prompts = torch.stack([rows["instance_prompt"], rows["prior_prompt"]])
    more = {"resolution": None, "aspect_ratio": None}
    return model(noisy, timestep=times, encoder_hidden_states=prompts, added_cond_kwargs=more).sample[:, :4]


def plain(part: Path) -> tuple[nn.Module, list[float]]:
    """Train as diffusers' train_dreambooth_lora.py does, from our first values and noise: one process, no library."""
    model, rows = rounded(part), load_file(part.parent / "rows.safetensors")
    scheduler = diffusers.DDPMScheduler.from_pretrained(part.parent / "scheduler")
    adapted = get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=linears(model)))  # type: ignore[arg-type]
    initialize_adapters(adapted, 0)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0), []
    for step in range(STEPS):
        total = 0.0
        for number in range(step * PAIRS, (step + 1) * PAIRS):
            torch.manual_seed(seed_of(0, number))
            latents = torch.stack([rows["instance"][number % 3], rows["prior"][number % 4]])
            noise, times = torch.randn(2, 4, 8, 8), torch.randint(1000, (2,))
            noisy = scheduler.add_noise(latents, noise, times)
            wanted = noise if part.name == "unet" else scheduler.get_velocity(latents, noise, times)
            ours, priors = predict(adapted, rows, noisy, times).chunk(2)
            loss = nn.functional.mse_loss(ours, wanted[:1]) + WEIGHT * nn.functional.mse_loss(priors, wanted[1:])
            (loss / PAIRS).backward()
            total += loss.item() / PAIRS
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return adapted, losses


def test_dreambooth_equals_diffusers_and_peft(
    part: Path, alone: tuple[Path, str], cli_env: dict[str, str], tmp_path: Path
):
    outs = {1: alone[0], 2: tmp_path / "two"}
    said = {1: alone[1], 2: dreambooth(part, outs[2], 2, cli_env)}
    held = {
        n: [numbers(line)[-2] for line in text.splitlines() if line.startswith("rank ")] for n, text in said.items()
    }
    assert [len(each) for each in held.values()] == [1, 2]
    # A weight of one row of storage, as in the tiny UNet's attention, lies on rank 0.
    assert max(held[2]) < (0.56 if part.name == "transformer" else 0.75) * held[1][0]
    assert sum(held[2]) < 1.02 * held[1][0]

    trained, wanted = plain(part)
    for n in (1, 2):
        losses = json.loads((outs[n] / "losses.json").read_text())
        assert close(losses, wanted, FP32_LOSSES), n
    rows = load_file(part.parent / "rows.safetensors")
    output = partial(predict, rows=rows, noisy=torch.ones(2, 4, 8, 8), times=torch.tensor([7, 700]))
    with torch.no_grad():
        before, after = output(rounded(part)), output(trained.eval())
        for n in (1, 2):
            in_peft = output(PeftModel.from_pretrained(rounded(part), str(outs[n] / "adapter")).eval())  # type: ignore[arg-type]
            model = rounded(part)
            model.load_lora_adapter(str(outs[n]), weight_name="pytorch_lora_weights.safetensors", prefix=part.name)  # type: ignore[operator]
            assert torch.equal(output(model), in_peft)
            assert (in_peft - after).abs().max() < 1e-3 * (after - before).abs().max()


def write_pipeline(part: Path) -> Any:
    """Save a Stable Diffusion pipeline with the UNet ``part`` and a tiny random VAE, text encoder and tokenizer."""
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
    )  # fmt: skip
    torch.manual_seed(1)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
            up_block_types=["UpDecoderBlock2D"] * 2,
        ),
        text_encoder=CLIPTextModel(config).eval(), tokenizer=CLIPTokenizer(vocab, [], model_max_length=24),
        unet=diffusers.AutoModel.from_pretrained(str(part)), scheduler=diffusers.DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(part.parent / "whole")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("part", ["unet"], indirect=True)
def test_from_images_to_images(part: Path, cli_env: dict[str, str], tmp_path: Path):
    pipeline, sizes = write_pipeline(part), {"photos": [(16, 16), (40, 24)], "dogs": [(16, 16)]}
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name, each in sizes.items():
        (tmp_path / name).mkdir()
        for i, (width, height) in enumerate(each):
            image = Image.fromarray(pixels[:height, :width])
            (image.convert("L") if i else image).save(tmp_path / name / f"{i}.png")
    script = [
        sys.executable,
        str(EXAMPLES / "library" / "encode_images.py"),
        str(part.parent / "whole"),
        "rows.safetensors",
    ]
    prompts = ["a photo of sks dog", "a photo of a dog"]
    run([*script, "--size=16", "--instance", "photos", prompts[0], "--prior", "dogs", prompts[1]], cli_env, tmp_path)
    rows = load_file(tmp_path / "rows.safetensors")
    assert rows["instance"].shape == (2, 4, 8, 8) and bool(rows["instance"].isfinite().all())
    with torch.no_grad():
        whole = torch.from_numpy(pixels[:16, :16]).permute(2, 0, 1)[None] / 127.5 - 1
        wanted = pipeline.vae.encode(whole).latent_dist.mean * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(rows["instance"][:1], wanted)
        torch.testing.assert_close(rows["prior"], wanted)
        for kind, prompt in zip(("instance", "prior"), prompts, strict=True):
            torch.testing.assert_close(rows[f"{kind}_prompt"][None], pipeline.encode_prompt(prompt, "cpu", 1, False)[0])

    dreambooth(part, tmp_path / "out", 1, cli_env, 2, tmp_path / "rows.safetensors")

    def draw() -> np.ndarray:
        torch.manual_seed(2)
        return pipeline(prompts[0], num_inference_steps=2, height=16, width=16, output_type="np").images

    before = draw()
    pipeline.load_lora_weights(str(tmp_path / "out"))
    loaded = draw()
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(), before)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, str(tmp_path / "out" / "adapter")).eval()
    assert not np.array_equal(loaded, before) and np.array_equal(loaded, draw())


@pytest.mark.parametrize("part", ["unet"], indirect=True)
def test_a_stopped_dreambooth_goes_on_as_if_it_had_not(
    part: Path, alone: tuple[Path, str], cli_env: dict[str, str], tmp_path: Path
):
    dreambooth(part, tmp_path / "parts", 1, cli_env, steps=13)  # the last checkpoint is of step 10
    said = dreambooth(part, tmp_path / "parts", 1, cli_env)
    assert "10 steps, loss" in said
    whole, parts = (out / "adapter" / "adapter_model.safetensors" for out in (alone[0], tmp_path / "parts"))
    assert whole.read_bytes() == parts.read_bytes()
