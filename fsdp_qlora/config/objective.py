"""Settings of the objectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.facts import NOT_NEGATIVE, YOUNGER

ProblemType = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]
Augmentation = Literal["flip_crop", "flip", "crop", "none"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """The training objective."""

    name: Annotated[str, choices.OBJECTIVES] = "sft"
    """``sft``: cross entropy on the supervised tokens, summed and divided by their global count.
    ``sequence_classification``: a label, several, or a number for each text or pair of texts.
    ``image_classification``: the same for each image."""
    labels: Annotated[list[str], YOUNGER] = field(default_factory=list)
    """Names of the labels, in the order of their numbers; empty = those of the training data, sorted."""
    problem_type: Annotated[ProblemType, YOUNGER] = "auto"
    """What the labels of texts and images are, as transformers calls it; ``auto`` goes by the data: lists are several
    labels at once, fractions are numbers to predict."""
    class_weights: Annotated[dict[str, float], YOUNGER] = field(default_factory=dict)
    """Label -> factor of its rows' loss, for labels that are rare; 1 for those left out."""
    image_size: Annotated[int, NOT_NEGATIVE, YOUNGER] = 0
    """Height and width of the images that the model gets, in pixels; 0 = as its image processor has it. If the model's
    table of positions is for another size, upstream's code interpolates it."""
    augmentation: Annotated[Augmentation, YOUNGER] = "flip_crop"
    """What changes images at random in training: half of them are mirrored (``flip``), and a part of each, at least
    half its area, is enlarged (``crop``)."""
