"""Rows with images: how they are read, stored and refused, and which settings do not go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.data.image_messages import marked
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.errors import ConfigError, DataError, ModelError, PlanError
from fsdp_qlora.run.decide import planned
from fsdp_qlora.run.images import settle_images
from fsdp_qlora.run.tokens import prepare_tokens
from tests.image_chats import upstream_row, write_conversations, write_image_chat_model
from tests.images import picture
from tests.tiny import make_model, sentence

TWO = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "or"}, {"type": "image", "path": "b.png"}]
ANSWER = {"role": "assistant", "content": "the second"}


def _texts(row: dict[str, Any]) -> str:
    return "".join(turn["content"] for turn in row["messages"])


def test_images_are_found_wherever_rows_name_them():
    row, paths = marked({"messages": [{"role": "user", "content": TWO}, ANSWER]})
    assert paths == ["a.png", "b.png"] and _texts(row).count("\ufdd0") == 2
    text = {"role": "user", "content": "<image>or<image>?"}
    assert marked({"messages": [text, ANSWER], "images": ["a.png", {"path": "b.png"}]})[1] == ["a.png", "b.png"]
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    assert marked({"messages": [parts, ANSWER], "image": "a.png"})[1] == ["a.png"]
    plain, none = marked({"messages": [{"role": "user", "content": "what is <image>?"}, ANSWER]})
    assert none == [] and _texts(plain) == "what is <image>?the second"  # no images: the word means itself


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([{"type": "image", "url": "https://x/y.png"}], {}, "only files are read"),
    ([{"type": "image", "image": "https://x/y.png"}], {}, "is a URL"),
    ([{"type": "image_url", "image_url": {"url": "x"}}], {}, "by a URL"),
    ([{"type": "image", "image": "data:image/png;base64,AA"}], {}, "base64"),
    ([{"type": "image"}], {}, "does not name"),
    ("no place", {"images": ["a.png"]}, "have a place for 0"),
    ("<image><image>", {"images": ["a.png"]}, "does not name"),
    ([{"type": "video", "path": "a.mp4"}], {}, "only text and images"),
    ([{"type": "image", "path": 3}], {}, "expected the path"),
    ("\ufdd0", {}, "no characters"),
]


def test_images_that_are_no_files_are_refused():
    for content, more, words in REFUSED:
        with pytest.raises(DataError, match=words):
            marked({"messages": [{"role": "user", "content": content}, ANSWER], **more})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL."""
    return write_image_chat_model(tmp_path_factory.mktemp("models") / "qwen2_vl", "qwen2_vl")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _prepared(model: Path, file: Path, **data: Any) -> PreparedData:
    settings = {"train": str(file), "eval_fraction": 0.0, "max_length": 256, **data}
    return prepare_tokens(from_dict({"model": {"name": str(model)}, "data": settings}))


def _rows(data: PreparedData) -> ColumnRows:
    assert data.train is not None
    rows = data.encoder.rows(data.train)
    assert isinstance(rows, ColumnRows)
    return rows


@pytest.mark.full
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_row_is_what_stock_code_makes_of_it(home, family):
    folder = write_image_chat_model(home / "model", family)
    file = write_conversations(home / "data", 6)
    rows = _rows(_prepared(folder, file))
    for number, line in enumerate(file.read_text().splitlines()):
        theirs, ours = (
            upstream_row(folder, family, json.loads(line), file.parent),
            dict(rows.collate([number], 0).tensors),
        )
        labels, supervised = ours.pop("labels"), ours.pop("supervised")
        assert torch.equal(labels[:, :-1], theirs.pop("labels")[:, 1:]) and labels[0, -1] == -100
        assert torch.equal(supervised, (labels != -100).flatten().nonzero().flatten())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


@pytest.mark.full
@pytest.mark.parametrize(("truncation", "kept"), [("right", 2), ("left", 1), ("drop", 1)])
def test_an_image_is_never_cut(home, model, truncation, kept):
    picture(1, 40, 40).save(home / "big.png")  # 25 tokens of 8 x 8 pixels
    image, answer = {"type": "image", "path": "big.png"}, {"role": "assistant", "content": sentence(1, 3)}
    long = {"role": "assistant", "content": sentence(2, 60)}
    turns = [
        [{"role": "user", "content": [image, image]}, answer],  # fits
        [{"role": "user", "content": [image]}, answer, {"role": "user", "content": [image, image, image]}, answer],
        [{"role": "user", "content": [image]}, long],  # on the right, only text is cut; on the left, the image
    ]
    file = home / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    data = _prepared(model, file, max_length=90, truncation=truncation)
    counts, rows = data.train_counts, _rows(data)
    assert (counts.rows, counts.kept, counts.dropped_long) == (3, kept, 3 - kept)
    assert counts.truncated == kept - 1 and list(rows.lengths <= 90) == [True] * kept
    token = AutoConfig.from_pretrained(model).image_token_id
    assert [int((np.asarray(rows.row(n)["input_ids"]) == token).sum()) for n in range(kept)] == [50, 25][:kept]


@pytest.mark.full
def test_bad_images_are_named_with_their_row(home, model):
    picture(1).save(home / "good.png")
    (home / "bad.png").write_text("no image")
    picture(1, 400, 1).save(home / "line.png")
    lines = {
        "bad.png": "is not an image", "missing.png": "there is no image", "line.png": "image processor does not take",
    }  # fmt: skip
    for name, words in lines.items():
        file = home / f"{name}.jsonl"
        rows = [
            {"messages": [{"role": "user", "content": [{"type": "image", "path": n}]}, ANSWER]}
            for n in ("good.png", name)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=rf"{name}.jsonl, line 2: .*{words}"):
            _prepared(model, file)
    file = home / "word.jsonl"
    said = {"messages": [{"role": "user", "content": "<|image_pad|>"}, ANSWER]}
    file.write_text(json.dumps(said) + "\n")
    with pytest.raises(DataError, match=r"0 images, but 1 tokens <\|image_pad\|>"):
        _prepared(model, file)


@pytest.mark.full
def test_another_image_is_other_data(home, model):
    file = write_conversations(home / "data", 6)
    before = _prepared(model, file).key
    assert _prepared(model, file).key == before
    picture(77, 24, 20).save(home / "data/images/0.png")
    assert _prepared(model, file).key != before


def test_settings_that_do_not_go_with_images_are_refused_before_torch():
    images = {"name": "sft", "images": "true"}
    for group, settings, words in (
        ("data", {"packing": True}, "data.packing: rows of a model that reads images"),
        ("data", {"truncation": "split"}, "cannot be split"),
        ("train", {"sample_prompts": ["hi"]}, "train.sample_prompts: not supported for a model that reads images"),
        ("quant", {"embeddings": "nf4"}, "quant.embeddings"),
        ("fsdp", {"offload_modules": ["norms"]}, "fsdp.offload_modules: not supported for a model that reads images"),
    ):
        said = failures(from_dict({"objective": images, "model": {"name": "m"}, group: settings}))
        assert any(words in line for line in said), (words, said)
    assert any(
        "objective.images: only objective=sft" in line
        for line in failures(from_dict({"objective": {"name": "seq2seq", "images": "true"}, "model": {"name": "m"}}))
    )


@pytest.mark.full
def test_the_model_decides_whether_rows_have_images(tmp_path, model):
    def settled(folder: Path, **groups: Any) -> str:
        config = from_dict({"model": {"name": str(folder)}, **groups})
        return settle_images(config, folder).objective.images

    assert settled(model) == "true" and settled(model, objective={"name": "sft", "images": "false"}) == "false"
    text = make_model(tmp_path / "text")
    assert settled(text) == "auto"
    with pytest.raises(ModelError, match="reads no images here"):
        settled(text, objective={"name": "sft", "images": "true"})
    with pytest.raises(ConfigError, match=r"data\.packing"):
        settled(model, data={"packing": True, "train": "x"})
    other = tmp_path / "other"
    other.mkdir()
    AutoConfig.for_model("idefics3").save_pretrained(other)
    with pytest.raises(ModelError, match=r"idefics3 reads images, .*llava, qwen2_vl, qwen2_5_vl"):
        planned(from_dict({"model": {"name": str(other)}}), 1)
    _, _, plan = planned(from_dict({"model": {"name": str(model)}, "lora": {"r": 4}}), 2)
    assert str(plan.choices["objective.images"]).startswith("true")
    assert plan.targets and all("language_model" in name for name in plan.targets)
    tower = {"target_modules": ["*.qkv"], "r": 4}
    _, _, plan = planned(from_dict({"model": {"name": str(model)}, "lora": tower}), 2)
    assert plan.targets == tuple(f"model.visual.blocks.{number}.attn.qkv" for number in range(2))
    with pytest.raises(PlanError, match=r"model\.visual.* does not go with lora\.variant=dora"):
        planned(from_dict({"model": {"name": str(model)}, "lora": tower | {"variant": "dora"}}), 2)
