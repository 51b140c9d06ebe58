"""What can be wrong with an image: the file (data), or what the caller handed over (contract)."""

from __future__ import annotations


class ImageError(ValueError):
    """An image that cannot be scored; the message names it and says what to do."""


class ImageContractError(ImageError):
    """A caller's mistake: a tensor or array of another range, dtype, shape or number of channels, or no image at all.

    It is raised at once, whatever ``on_error`` says. What is wrong with a file (missing, damaged, of an unknown format)
    or with single pixels (NaN, infinity) is data instead: that image has no score, and its result says why.
    """
