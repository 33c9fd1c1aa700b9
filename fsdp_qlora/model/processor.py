"""What reads a model's rows if they are no texts: its image processor, or its feature extractor of recordings."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import ConfigError, ModelError, first_line, typed_line
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.write import copy_regular
from fsdp_qlora.model.config import GENERATION, not_buildable, require_sane
from fsdp_qlora.model.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, WhisperProcessor, WhisperTokenizer

FILE = "preprocessor_config.json"
_SEVERAL = 51_865
"""Tokens of a Whisper that knows several languages; one that knows only English has fewer."""


_TEMPLATE = "chat_template.json"
_BESIDE = (FILE, "processor_config.json", "video_preprocessor_config.json")
"""Files of a processor, besides those of its tokenizer."""


@dataclass(frozen=True)
class ImageTextProcessor:
    """What reads texts with images: a tokenizer and an image processor.

    Upstream's own class around both would also load a video processor, which needs torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    folder: Path
    """The model's folder."""

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files into ``folder``, and the processor's as they came with the model."""
        self.tokenizer.save_pretrained(folder)
        for name in _BESIDE:
            if (self.folder / name).is_file():
                copy_regular(own_file(self.folder, name), Path(folder, name))


def build_image_text_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, own_template: bool = True, trust_remote_code: bool = False
) -> ImageTextProcessor:
    """Return what reads texts with images for the model in ``folder``.

    Args:
        folder: the model's folder.
        tokenizer: its tokenizer.
        own_template: whether the chat template is the model's. Older folders keep the processor's in a file of its own.
        trust_remote_code: whether code may come with the model.

    Raises:
        ConfigError, ModelError, SecurityError: as `build_image_processor`.
    """
    if own_template and (folder / _TEMPLATE).is_file():
        try:
            tokenizer.chat_template = read_json(own_file(folder, _TEMPLATE), dict[str, str])["chat_template"]
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.name: {folder / _TEMPLATE} holds no chat template: {typed_line(error)}") from error
    return ImageTextProcessor(tokenizer, build_image_processor(folder, 0, trust_remote_code), folder)


def build_image_processor(folder: Path, size: int = 0, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Load the image processor of ``folder``, in the form that computes with Pillow and numpy.

    Args:
        folder: the model's folder.
        size: height and width of the images that it makes, in pixels; 0 = its own.
        trust_remote_code: whether its code may come with the model.

    Raises:
        ConfigError: if Pillow is not installed.
        ModelError: if there is no processor that transformers can load, or it has no size that can be set.
        SecurityError: if its file is a link that leads outside the folder.
    """
    if find_spec("PIL") is None:
        raise ConfigError(
            "objective: images need Pillow, which is not installed; run `pip install 'fsdp-qlora[images]'`."
        )
    from transformers import AutoImageProcessor

    own_file(folder, FILE)
    require_sane(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file can raise anything
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable image processor ({FILE}): {typed_line(error)}") from error
    if size:
        _resize(processor, size)
    return processor


def _resize(processor: Any, size: int) -> None:
    """Let a processor make images of ``size`` x ``size``; what it crops away keeps its share."""
    before, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    crops = bool(getattr(processor, "do_center_crop", False)) and {"height", "width"} <= crop.keys()
    if crops:
        processor.crop_size = type(processor.crop_size)(height=size, width=size)
    factor = size / int(crop["height"]) if crops else 1
    if {"height", "width"} <= before.keys():
        sides = {key: round(before[key] * factor) if crops else size for key in ("height", "width")}
        processor.size = type(processor.size)(**sides)
    elif "shortest_edge" in before and "longest_edge" not in before and crops:
        processor.size = type(processor.size)(shortest_edge=round(before["shortest_edge"] * factor))
    else:
        raise ModelError(
            f"objective.image_size: the size of {type(processor).__name__} ({before}) cannot be set to {size}; leave "
            "it out."
        )


def build_speech_processor(
    folder: Path, language: str | None, task: str, trust_remote_code: bool = False
) -> WhisperProcessor:
    """Load the feature extractor and the tokenizer of a Whisper, whose targets begin as language and task ask.

    Args:
        folder: the model's folder.
        language: what is spoken, by name or code; None for a model that knows only English.
        task: ``transcribe`` or ``translate``.
        trust_remote_code: whether the tokenizer's code may come with the model.

    Raises:
        ConfigError: if scipy is not installed, or the language does not go with the model.
        ModelError: if one of the two is missing or not Whisper's, or draws noise at random.
        SecurityError: if one of the files is a link that leads outside the folder.
    """
    if find_spec("scipy") is None:
        raise ConfigError(
            "objective: recordings need scipy, which is not installed; run `pip install 'fsdp-qlora[audio]'`."
        )
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    tokenizer = build_tokenizer(folder, trust_remote_code)
    if not isinstance(tokenizer, WhisperTokenizer):
        raise ModelError(
            f"model.name: the tokenizer of {folder} is a {type(tokenizer).__name__}, which does not know how Whisper's "
            "texts begin; set tokenizer_class to WhisperTokenizer in its tokenizer_config.json."
        )
    own_file(folder, FILE)
    try:
        extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(
            f"model.name: {folder} has no usable feature extractor ({FILE}): {typed_line(error)}"
        ) from error
    if extractor.dither:
        raise ModelError(
            f"model.name: dither in {folder / FILE} adds noise at random to every recording; set it to 0.0 there."
        )
    _begin(tokenizer, folder, language, task)
    return WhisperProcessor(extractor, tokenizer)


def _begin(tokenizer: WhisperTokenizer, folder: Path, language: str | None, task: str) -> None:
    """Set the tokens that a Whisper's targets begin with."""
    several = _knows_several(folder)
    if several and language is None:
        raise ConfigError(
            "objective.language: this Whisper knows several languages and is told which one it hears; set the one that "
            "is spoken in the data (objective.language=en)."
        )
    if not several and (language is not None or task != "transcribe"):
        key = "task" if language is None else "language"
        raise ConfigError(f"objective.{key}: this Whisper knows only English and is told neither; leave it out.")
    tokenizer.language = tokenizer.task = None  # those of its files
    try:
        tokenizer.set_prefix_tokens(language=language, task=task if several else None, predict_timestamps=False)
    except ValueError as error:
        raise ConfigError(f"objective.language: {first_line(error)}") from error
    if None in tokenizer.prefix_tokens or tokenizer.unk_token_id in tokenizer.prefix_tokens:
        raise ModelError(f"model.name: the tokenizer of {folder} lacks tokens that Whisper's targets begin with.")


def _knows_several(folder: Path) -> bool:
    """Whether a Whisper knows several languages, by its generation_config.json, else by the size of its vocabulary.

    The size is OpenAI's own rule (``Whisper.is_multilingual`` in openai/whisper).
    """
    file = folder / GENERATION
    if file.is_file():
        said = read_json(own_file(folder, GENERATION), dict[str, Any]).get("is_multilingual")
        if isinstance(said, bool):
            return said
    return read_json(own_file(folder, "config.json"), dict[str, Any]).get("vocab_size", 0) >= _SEVERAL


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer among what reads a model's rows, if there is one."""
    texts = getattr(processor, "tokenizer", processor)
    return texts if isinstance(texts, PreTrainedTokenizerBase) else None


if TYPE_CHECKING:
    Processor = PreTrainedTokenizerBase | BaseImageProcessor | WhisperProcessor | ImageTextProcessor
    """What reads a model's rows."""
