"""What a plan needs to know of the part of a model that reads images among a decoder's tokens.

Names and numbers only; no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A vision tower. Its images have one size (``image_patches``, ``image_tokens``), or any (``merged``)."""

    blocks: tuple[str, ...]
    """Names of its blocks, in order."""
    width: int
    """Numbers that a block passes on for each patch."""
    num_heads: int
    patch_inputs: int
    """Numbers that the model reads for each patch."""
    image_patches: int = 0
    """Patches of an image, a class token included; 0 if images differ in size."""
    image_tokens: int = 0
    """Tokens that the decoder reads for an image; 0 if images differ in size."""
    merged: int = 1
    """Patches of a token, where images differ in size."""
    gated: bool = False
    """Whether the activation function keeps a tensor besides its input: it is gated, or computed in two steps."""
    rotary: bool = False
    float32_norms: bool = False
    states: int = 1
    """Blocks whose outputs are kept until the decoder is through."""
    features: int = 1
    """Features that the decoder reads for a token: several if its first layers read some as well (DeepStack)."""
    most_tokens: int | None = None
    """Most tokens of images in a row; None: as many as the row may have."""

    def patches(self, max_length: int) -> int:
        """Return the most patches in a row of ``max_length`` tokens: an image is never cut."""
        tokens = self.tokens(max_length)
        return tokens // self.image_tokens * self.image_patches if self.image_tokens else tokens * self.merged

    def tokens(self, max_length: int) -> int:
        """Return the most tokens of images in a row of ``max_length`` tokens."""
        return max_length if self.most_tokens is None else min(max_length, self.most_tokens)

    def longest(self, max_length: int) -> int:
        """Return the most patches that see each other: those of one image, which may be all of a row."""
        return self.image_patches or self.patches(max_length)
