"""Frames of a video file, by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from vqr1_metric.images.errors import ImageError

#: Containers of one file. Others, such as play lists, name further files and addresses, which would then be opened.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,yuv4mpegpipe,ivf,obu,h264,hevc,m4v,gif,apng"
)
VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".ogv", ".flv", ".3gp", ".y4m",
    ".ivf", ".gif", ".apng",
))  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """One frame: its number from 0, its time in seconds (None if the file does not say), and the picture."""

    number: int
    time: float | None
    image: Image.Image


def read_frames(path: str, every: int) -> Iterator[Frame]:
    """Every so-manieth frame of the first video stream, decoded one by one, turned as the file says.

    Raises:
        ImageError: without PyAV, for a file that is no video, and where it is damaged.
    """
    try:
        import av
    except ImportError:
        raise ImageError(f"{path}: a video needs PyAV: pip install 'vqr1-metric[video]'") from None
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(path, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ImageError(f"{path}: holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number % every == 0:
                    image = frame.to_image()
                    turned = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    yield Frame(number, frame.time, turned)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path}: is no video that can be read, or is damaged ({reason})") from None
