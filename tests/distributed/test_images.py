"""image_classification from files to an adapter in plain transformers; bad rows; models that have no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.errors import FsdpQloraError, ModelError
from tests.build import build, run_fit
from tests.images import picture, write_classes, write_vision
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full
NAMES = ["calm", "odd", "wild"]
PLAIN = {
    "objective": {"name": "image_classification"},
    "quant": {"name": "none", "double_quant": False},
    "precision": {"name": "fp32"},
    "schedule": {"name": "constant", "warmup_ratio": 0.0},
}


def _plain_loss(base: Path, adapter: Path, files: list[Path]) -> float:
    """Return the mean loss of images in class folders by plain transformers and PEFT, from the exported files alone."""
    from peft import PeftModel

    processor = AutoImageProcessor.from_pretrained(adapter)
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForImageClassification.from_pretrained(base, config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    pixels = processor(images=[Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([config.label2id[file.parent.name] for file in files])
    with torch.no_grad():
        return float(model(pixel_values=pixels, labels=labels).loss)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
def test_sixteen_images_are_learned_and_the_export_stands_alone(pool, tmp_path, family):
    base = write_vision(tmp_path / "base", family)
    images = write_classes(tmp_path / "train", NAMES, 16)
    groups = PLAIN | {
        "objective": {"name": "image_classification", "augmentation": "none"},
        "data": {"train": str(images), "eval": str(images)},
        "train": {"max_steps": 40, "global_batch_size": 8, "micro_batch_size": 8},
        "optim": {"lr": 1e-2},
    }
    summary = pool.run(2, run_fit, str(base), str(tmp_path), "run", groups)[0]["summary"]
    assert summary["metrics_after"] == {"accuracy": 1.0, "f1": 1.0}
    assert summary["eval_loss_after"] < 0.2 * summary["eval_loss_before"]
    adapter = tmp_path / "run/adapter"
    assert AutoConfig.from_pretrained(adapter).id2label == dict(enumerate(NAMES))
    assert json.loads((adapter / "preprocessor_config.json").read_text())["image_mean"]
    loss = _plain_loss(base, adapter, sorted(images.glob("*/*.png")))
    assert loss == pytest.approx(summary["eval_loss_after"], rel=FP32_LOSSES)


def _refusals(ranks, base: str, cases: dict) -> dict[str, str]:
    said = {}
    for name, groups in cases.items():
        try:
            build(ranks, base, **{**PLAIN, **groups}).close()
        except FsdpQloraError as error:
            said[name] = f"{error.exit_code} {error}"
    return said


def _write_rows(file: Path, *rows: dict) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_bad_rows_and_models_are_refused_by_name(pool, tmp_path):
    base = write_vision(tmp_path / "base", "vit")
    images = write_classes(tmp_path / "train", NAMES[:2], 6)
    good = [{"image": f"train/calm/{n}.png", "label": "calm"} for n in (0, 2)]
    good += [{"image": f"train/odd/{n}.png", "label": "odd"} for n in (1, 3)]
    (tmp_path / "cut.png").write_bytes((images / "calm/0.png").read_bytes()[:300])
    write_classes(tmp_path / "holes", NAMES, 3)
    (tmp_path / "holes/odd/1.png").unlink()
    write_classes(tmp_path / "held", [*NAMES[:1], "new"], 2)
    rows = {
        "missing": [*good, {"image": "train/calm/77.png", "label": "calm"}],
        "truncated": [*good, {"image": "cut.png", "label": "odd"}],
        "no image": [*good, {"picture": "train/calm/0.png", "label": "calm"}],
        "no path": [*good, {"image": {"bytes": "..."}, "label": "calm"}],
        "no label": [*good, {"image": "train/calm/0.png"}],
    }
    cases = {name: {"data": {"train": _write_rows(tmp_path / f"{name}.jsonl", *r)}} for name, r in rows.items()}
    words = {
        "missing": ["missing.jsonl, line 5", "train/calm/77.png", "there is no image"],
        "truncated": ["truncated.jsonl, line 5", "cut.png", "cannot be read"],
        "no image": ["no image.jsonl, line 5", "no 'image'"],
        "no path": ["no path.jsonl, line 5", "path of an image file"],
        "no label": ["no label.jsonl, line 5", "no 'label'"],
    }
    labels = {"labels": ["calm", "odd"], "problem_type": "single_label_classification"}
    out_of_range = _write_rows(tmp_path / "range.jsonl", good[0], {**good[1], "label": 2})
    cases["out of range"] = {"data": {"train": out_of_range}, "objective": PLAIN["objective"] | labels}
    words["out of range"] = ["range.jsonl, line 2", "label 2 is out of range"]
    cases["empty class"] = {"data": {"train": str(tmp_path / "holes")}}
    words["empty class"] = ["holes/odd holds no image"]
    cases["label only held out"] = {"data": {"train": str(images), "eval": str(tmp_path / "held")}}
    words["label only held out"] = ["held/new/1.png", "unknown label 'new'"]
    said = pool.run(1, _refusals, str(base), cases)[0]
    for name, expected in words.items():
        assert said[name].startswith("2 ") and said[name].count("\n") == 0, (name, said.get(name))
        for word in expected:
            assert word in said[name], (name, said[name])


def test_sizes_that_differ_are_refused_unless_asked_for(pool, tmp_path):
    images = write_classes(tmp_path / "train", NAMES, 6)
    base = write_vision(tmp_path / "base", "vit", image_size=48)  # its processor makes 32 x 32
    cases = {
        "differs": {"data": {"train": str(images)}},
        "asked for": {"data": {"train": str(images)}, "objective": {**PLAIN["objective"], "image_size": 32}},
        "another table": {"data": {"train": str(images)}, "model": {"config_overrides": {"image_size": 32}}},
    }
    said = pool.run(1, _refusals, str(base), cases)[0]
    assert "asked for" not in said, said
    assert said["differs"].startswith("2 ") and "objective.image_size" in said["differs"]
    assert "ViTForImageClassification" in said["differs"] and "32 x 32" in said["differs"]
    assert said["another table"].startswith("2 ") and "position_embeddings" in said["another table"]
    (base / "preprocessor_config.json").unlink()
    said = pool.run(1, _refusals, str(base), {"no processor": cases["differs"]})[0]
    assert said["no processor"].startswith("2 ") and "no usable image processor" in said["no processor"]


def _skipped(ranks, base: str, rows: str) -> tuple[int, int, list[int], str]:
    prepared = build(ranks, base, **PLAIN, data={"train": rows, "on_bad_row": "skip"})
    data = prepared.data
    assert data is not None and data.train is not None
    try:
        return data.num_bad, data.train_counts.kept, [len(data.train)], str(prepared.tokenizer)
    except ModelError as error:
        held = data.encoder.rows(data.train)
        assert isinstance(held, ColumnRows)
        shown = "".join(segment.text for segment in data.encoder.segments(held, 0))
        return (
            data.num_bad,
            data.train_counts.kept,
            list(held.collate([0, 1], 0).tensors["pixel_values"].shape),
            (f"{shown}\n{error}"),
        )
    finally:
        prepared.close()


def test_bad_images_are_skipped_if_asked_and_there_is_no_tokenizer(pool, tmp_path):
    base = write_vision(tmp_path / "base", "vit")
    write_classes(tmp_path / "train", NAMES[:2], 6)
    rows = [{"image": f"train/{NAMES[n % 2]}/{n}.png", "label": NAMES[n % 2]} for n in range(7)]
    picture(5).convert("L").save(tmp_path / "train/odd/5.png")
    bad, kept, shape, said = pool.run(1, _skipped, str(base), _write_rows(tmp_path / "rows.jsonl", *rows))[0]
    assert (bad, kept, shape) == (1, 6, [2, 3, 32, 32])
    assert said.startswith("train/calm/0.png calm\n") and "has no tokenizer" in said
