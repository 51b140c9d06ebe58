"""What the service accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask for; together they bound the memory of the service.

    Args:
        pictures: in one request; more give 413.
        body_bytes: of one request; more give 413.
        pixels: of one picture, read from its header before anything is decoded; more are an error of that picture.
        requests: in progress at a time; more give 503 with ``Retry-After``.
        decoded_pixels: of all pictures that are decoded and not yet scored, 3 bytes each; further ones wait.
        upload_seconds: for one request to arrive; slower ones give 408.
        stall_seconds: without a byte of a request, which then gives 408.
    """

    pictures: int = 32
    body_bytes: int = 64 << 20
    pixels: int = 50_000_000
    requests: int = 64
    decoded_pixels: int = 200_000_000
    upload_seconds: float = 60.0
    stall_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Expected {name} above 0, but got {value}.")
