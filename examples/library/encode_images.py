"""Images and prompts -> what `dreambooth.py` trains on, by a Stable Diffusion pipeline's own VAE and text encoder.

    python examples/library/encode_images.py PIPELINE ROWS.safetensors \\
        --instance photos/ "a photo of sks dog" --prior dogs/ "a photo of a dog"

Runs once, in one process: training then needs neither of the two.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def encode_folder(vae: AutoencoderKL, folder: Path, size: int) -> torch.Tensor:
    """Return the latents ``[images, channels, size / 8, size / 8]`` of a folder's images, cut to squares."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        raise SystemExit(f"{folder}: no image in it ({', '.join(IMAGES)}).")
    latents = []
    for file in files:
        with Image.open(file) as image:
            pixels = VaeImageProcessor().preprocess(image.convert("RGB"), size, size, resize_mode="crop")
        latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(latents)


def encode_prompt(pipeline: str, prompt: str) -> torch.Tensor:
    """Return a prompt's embedding ``[tokens, width]``, padded as the pipeline pads it."""
    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    length = encoder.config.max_position_embeddings
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state[0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Encode images and prompts for dreambooth.py.")
    parser.add_argument("pipeline", help="folder of a Stable Diffusion pipeline")
    parser.add_argument("rows", help="safetensors file to write")
    parser.add_argument("--instance", nargs=2, required=True, metavar=("FOLDER", "PROMPT"), help="the subject")
    parser.add_argument("--prior", nargs=2, required=True, metavar=("FOLDER", "PROMPT"), help="others of its class")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    asked = parser.parse_args()
    vae, rows = AutoencoderKL.from_pretrained(asked.pipeline, subfolder="vae"), {}
    for kind, (folder, prompt) in {"instance": asked.instance, "prior": asked.prior}.items():
        rows[kind] = encode_folder(vae, Path(folder), asked.size)
        rows[f"{kind}_prompt"] = encode_prompt(asked.pipeline, prompt)
    save_file({name: tensor.contiguous() for name, tensor in rows.items()}, asked.rows)
    print(", ".join(f"{name} {list(tensor.shape)}" for name, tensor in rows.items()))


if __name__ == "__main__":
    main()
