"""Images: what is refused when rows are prepared, how they are read, and what a copy of the data changes."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.data.image_rows import image_rows, images_fingerprint, images_not_read, is_class_folder
from fsdp_qlora.data.images import check_images, read_image
from fsdp_qlora.data.tokens import column_reader
from fsdp_qlora.errors import ConfigError, DataError
from fsdp_qlora.objectives.augment import augmented
from tests.images import picture, write_classes

READ = column_reader({}, None)


def _named(row):
    """Return the path of the image of a row."""
    return [READ(row)["image"]]


def _write_header(file, width, height):
    """Write a PNG that says how large it is, and ends."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def _spoil(folder):
    """Write images that cannot be read; return name -> a word of the refusal."""
    for suffix in ("png", "jpg", "webp", "bmp"):
        whole = folder / f"whole.{suffix}"
        picture(3, 200, 160).save(whole)
        (folder / f"cut.{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    _write_header(folder / "bomb.png", 14_000, 14_000)  # 196 million pixels: Pillow refuses it
    _write_header(folder / "large.png", 9_600, 9_400)  # 90 million, just above Pillow's limit: it only warns
    words = {"text.png": "not an image", "empty.png": "not an image", "folder.png": "no regular file"}
    words |= {"pipe.png": "no regular file", "deep.png": "8 bits", "bomb.png": "pixels", "large.png": "pixels"}
    words |= {f"cut.{suffix}": "cannot be read" for suffix in ("png", "jpg", "webp", "bmp")}
    return words | {"missing.png": "there is no image"}


def test_images_that_cannot_be_read_are_named(tmp_path):
    words = _spoil(tmp_path)
    said = check_images([tmp_path / name for name in words])
    for name, problem in zip(words, said, strict=True):
        assert isinstance(problem, DataError), name
        assert words[name] in str(problem) and str(tmp_path / name) in str(problem), (name, str(problem))
    whole = check_images([tmp_path / f"whole.{suffix}" for suffix in ("png", "jpg", "webp", "bmp")])
    assert all(isinstance(digest, bytes) for digest in whole) and len(set(whole)) == 4


def test_images_become_rgb_and_upright(tmp_path):
    colour = picture(1)
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "1"):
        kind = "tiff" if mode in ("CMYK", "LA") else "png"
        colour.convert(mode).save(tmp_path / f"{mode}.{kind}")
        image = read_image(tmp_path / f"{mode}.{kind}")
        assert image.mode == "RGB" and image.size == colour.size
    grey = np.asarray(read_image(tmp_path / "L.png"))
    assert (grey == np.asarray(colour.convert("L"))[..., None]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    colour.save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(read_image(tmp_path / "turned.png"))
    assert (turned == np.rot90(np.asarray(colour), -1)).all()


def test_class_folders(tmp_path):
    folder = write_classes(tmp_path / "train", ["calm", "odd"], 6)
    (folder / "odd" / "notes.txt").write_text("skipped")
    (folder / ".hidden").mkdir()
    assert is_class_folder(str(folder))
    rows = [(row.values["image"], row.values["label"]) for row in image_rows(str(folder))]
    assert rows == [(f"calm/{n}.png", "calm") for n in (0, 2, 4)] + [(f"odd/{n}.png", "odd") for n in (1, 3, 5)]
    assert "odd/notes.txt" in images_not_read([str(folder)])[0]

    copy = shutil.copytree(folder, tmp_path / "copy")
    before = images_fingerprint(str(folder), _named)
    assert images_fingerprint(str(copy), _named) == before
    picture(99).save(copy / "odd" / "1.png")
    assert images_fingerprint(str(copy), _named) != before
    (folder / "odd" / "1.png").rename(folder / "odd" / "9.png")
    assert images_fingerprint(str(folder), _named) != before

    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty holds no image"):
        list(image_rows(str(folder)))


@pytest.mark.full
def test_rows_name_images_from_their_own_folder(tmp_path):
    write_classes(tmp_path, ["calm"], 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "calm/0.png", "label": 1}) + "\n")
    (row,) = image_rows(str(rows))
    assert row.folder == str(tmp_path) and not is_class_folder(str(tmp_path))
    before = images_fingerprint(str(rows), _named)
    picture(99).save(tmp_path / "calm" / "0.png")
    assert images_fingerprint(str(rows), _named) != before


@pytest.mark.full
@pytest.mark.parametrize("kind", ["flip_crop", "flip", "crop", "none"])
def test_augmentation_depends_on_its_seed_alone(kind):
    image = picture(2, 60, 44)

    def made(*seed):
        return np.asarray(augmented(image, kind, np.random.Generator(np.random.PCG64(list(seed)))))

    assert (made(0, 8, 3) == made(0, 8, 3)).all()
    several = [made(0, 8, row) for row in range(20)]
    sizes = {one.shape for one in several}
    assert (len(sizes) > 10) == ("crop" in kind) and all(h * w >= 0.45 * 60 * 44 for h, w, _ in sizes)
    if kind == "flip":
        plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
        assert {bool((one == plain).all()) for one in several} == {True, False}
        assert all((one == plain).all() or (one == mirrored).all() for one in several)
    if kind == "none":
        assert all((one == np.asarray(image)).all() for one in several)


REFUSED = {
    "generate": ({"prompt": "a cat"}, "writes no texts"),
    "export": ({"what": "merged", "export": {"to": "merged"}}, "is for language models"),
    "evaluate": ({"data": {"eval": "x"}, "evaluate": {"tasks": ["arc_easy"]}}, "evaluate.tasks"),
}


@pytest.mark.full
@pytest.mark.parametrize("verb", REFUSED)
def test_what_needs_a_tokenizer_is_refused(verb):
    settings, word = REFUSED[verb]
    config = from_dict({"model": {"name": "x"}, "objective": {"name": "image_classification"}, **settings})
    with pytest.raises(ConfigError, match=word):
        check_verb(verb, check(config))
