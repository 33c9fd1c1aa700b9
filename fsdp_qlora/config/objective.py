"""What a run learns: the group ``objective``. See `fsdp_qlora.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.auto import Switch
from fsdp_qlora.config.facts import NOT_NEGATIVE, POSITIVE, SHARE, VERBATIM, YOUNGER

Augmentation = Literal["flip_crop", "flip", "crop", "none"]
Source = Literal["auto", "text", "audio"]
Pooling = Literal["auto", "mean", "cls", "lasttoken"]
SpeechTask = Literal["transcribe", "translate"]
ProblemType = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """The training objective."""

    name: Annotated[str, choices.OBJECTIVES] = "sft"
    """``sft``: cross entropy on the supervised tokens, summed and divided by their global count.
    ``sequence_classification``: a label, several, or a number for each text or pair of texts.
    ``token_classification``: a label for each word of a text.
    ``masked_lm``: words of a text that are masked (BERT).
    ``embedding``: a vector for each text; those of a pair lie close together.
    ``seq2seq``: an encoder-decoder reads a source and writes a target.
    ``image_classification``: a label, several, or a number for each image."""
    images: Annotated[Switch, YOUNGER] = "auto"
    """Of ``sft``: whether conversations may hold images, which the model reads among their tokens; ``auto`` = if its
    config.json describes such a model (LLaVA, Qwen2-VL)."""
    labels: Annotated[list[str], YOUNGER] = field(default_factory=list)
    """Names of the labels, in the order of their numbers; empty = those of the training data, sorted."""
    problem_type: Annotated[ProblemType, YOUNGER] = "auto"
    """What the labels of texts and images are, as transformers calls it; ``auto`` goes by the data: lists are several
    labels at once, fractions are numbers to predict."""
    class_weights: Annotated[dict[str, float], YOUNGER] = field(default_factory=dict)
    """Label -> factor of its rows' loss, for labels that are rare; 1 for those left out."""
    mask_probability: Annotated[float, SHARE, YOUNGER] = 0.15
    """Of ``masked_lm``: share of a row's tokens that are to be predicted."""
    whole_words: Annotated[bool, YOUNGER] = False
    """Of ``masked_lm``: choose whole words rather than single tokens."""
    temperature: Annotated[float, POSITIVE, YOUNGER] = 0.05
    """Of ``embedding``: what cosine similarities are divided by."""
    pooling: Annotated[Pooling, YOUNGER] = "auto"
    """Of ``embedding``: what makes a vector of a text's hidden states; ``auto`` = as the model's ``1_Pooling`` says,
    else the mean of an encoder's, and a decoder's last."""
    max_target_length: Annotated[int, POSITIVE, YOUNGER] = 128
    """Of ``seq2seq``: the longest target in tokens, to learn and to write; ``data.truncation`` says what becomes of
    longer ones, and ``data.max_length`` is that of sources."""
    source_prefix: Annotated[str, VERBATIM, YOUNGER] = ""
    """Of ``seq2seq``: put before each source (``'summarize: '``, for T5's)."""
    generate_rows: Annotated[int, NOT_NEGATIVE, YOUNGER] = 64
    """Of ``seq2seq``: held-out rows, spread evenly, whose targets each evaluation writes, for ROUGE and BLEU, or the
    word error rate; 0 = none, only the loss."""
    source: Annotated[Source, YOUNGER] = "auto"
    """Of ``seq2seq``: what the encoder reads; ``auto`` goes by the model: ``audio`` for Whisper, else ``text``."""
    language: Annotated[str | None, YOUNGER] = None
    """Of ``seq2seq`` with audio: the language that is spoken (``en`` or ``english``), as a Whisper of several languages
    is told it; null for one that only knows English."""
    task: Annotated[SpeechTask, YOUNGER] = "transcribe"
    """Of ``seq2seq`` with audio: what a Whisper of several languages writes: what is said, or its translation into
    English."""
    image_size: Annotated[int, NOT_NEGATIVE, YOUNGER] = 0
    """Of ``image_classification``: height and width of the images that the model gets, in pixels; 0 = as its image
    processor has it. If the model's table of positions is for another size, upstream's code interpolates it."""
    augmentation: Annotated[Augmentation, YOUNGER] = "flip_crop"
    """Of ``image_classification``: what changes images at random in training: half of them are mirrored (``flip``),
    and a part of each, at least half its area, is enlarged (``crop``)."""
