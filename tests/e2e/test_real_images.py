"""DINOv2-small on scikit-learn's digits: a run beats a linear probe of the same features on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fsdp_qlora.model.processor import build_image_processor
from tools.dinov2 import DINOV2

pytestmark = [pytest.mark.launch, pytest.mark.full]
SIZE, TRAIN, HELD = 28, 400, 400
"""Height and width of the images that the model gets, which its table of positions is resized for; rows."""


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Folder with ``train`` and ``held``, each with a folder of PNGs for each digit."""
    pytest.importorskip("sklearn", reason="its digits are the data; `pip install 'fsdp-qlora[tasks]'`")
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images[: TRAIN + HELD], data.target, strict=False)):
        folder = tmp_path / "digits" / ("train" if number < TRAIN else "held") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        # white paper, and a margin: the processor cuts off an eighth
        Image.fromarray((255 - np.pad(pixels, 1) * 15.9).astype(np.uint8)).save(folder / f"{number:04}.png")
    return tmp_path / "digits"


def _features(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Return what plain transformers makes of the images, and their labels: inputs of the model's own head."""
    from transformers import Dinov2Model

    model, processor = Dinov2Model.from_pretrained(DINOV2).eval(), build_image_processor(DINOV2, SIZE)
    files = sorted(folder.glob("*/*.png"))
    made = []
    with torch.no_grad():
        for start in range(0, len(files), 100):
            images = [Image.open(file).convert("RGB") for file in files[start : start + 100]]
            hidden = model(**processor(images=images, return_tensors="pt")).last_hidden_state
            made.append(torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1))
    return torch.cat(made).numpy(), [file.parent.name for file in files]


@pytest.mark.timeout(3600)
def test_digits_are_read_better_than_by_a_linear_probe(cli, digits, tmp_path):
    if not (DINOV2 / "config.json").is_file():
        pytest.skip("not here; `python -m tools.dinov2` fetches it")
    from sklearn.linear_model import LogisticRegression

    result = cli(
        "train", "objective=image_classification", f"model.name={DINOV2}", f"data.train={digits / 'train'}",
        f"data.eval={digits / 'held'}", f"objective.image_size={SIZE}", "objective.augmentation=none",
        "train.num_epochs=6", "train.global_batch_size=20", "train.micro_batch_size=10", "optim.lr=1e-3",
        "run.name=digits", "launcher.device=cpu", "launcher.nproc_per_node=2", timeout=3000,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "torchvision" not in result.stderr + result.stdout
    summary = json.loads((tmp_path / "outputs/digits/summary.json").read_text())
    accuracy, before = summary["metrics_after"]["accuracy"], summary["metrics_before"]["accuracy"]
    known, labels = _features(digits / "train")
    new, wanted = _features(digits / "held")
    probe = float(LogisticRegression(max_iter=3000).fit(known, labels).score(new, wanted))
    majority = max(wanted.count(label) for label in set(wanted)) / len(wanted)
    interval = 1.96 * (accuracy * (1 - accuracy) / HELD) ** 0.5
    print(
        f"digits: {before:.3f} -> {accuracy:.3f} +- {interval:.3f}; linear probe {probe:.3f}, majority {majority:.3f}"
    )
    assert accuracy - interval > probe > majority
