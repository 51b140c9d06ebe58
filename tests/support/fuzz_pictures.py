"""Mutated picture files through ``load_image``, in a process of their own.

    python tests/fuzz_pictures.py COUNT SEED FOLDER

Every second file goes through the disk, where Pillow maps some kinds into memory. Prints one JSON line: how many were
read, how many refused, the slowest, the growth of memory. A file that raises anything but ImageError is named and ends
the run; a crash or a hang ends the process, and ``FOLDER/number`` says at which. ``mutated(seed, number, seeds())`` is
the file.
"""

import io
import json
import random
import resource
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, features

from vqr1_metric.images import ImageError, load_image

SECONDS = 5  # of the processor, for one file
CLOCK = 600  # seconds, for one file: for a decoder that waits; a machine may be busy with other things
GIGABYTES = 4  # of address space for the process, the libraries' 2 included


def seeds() -> list[tuple[str, bytes]]:
    """Good files of every kind that is mutated, small but not trivial."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(photo).ellipse((10, 8, 40, 40), fill=(200, 30, 30))
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    frames = [photo.rotate(angle) for angle in (0, 30, 60)]
    exif = photo.getexif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(photo)[..., 0].astype(np.uint16) * 257)
    wanted = [
        ("PNG", photo, {}),
        ("PNG", alpha, {}),
        ("PNG", photo.convert("P"), {"transparency": 3}),
        ("PNG", deep, {}),
        ("PNG", photo, {"save_all": True, "append_images": frames}),
        ("PNG", photo.convert("1"), {}),
        ("JPEG", photo, {"quality": 80, "exif": exif}),
        ("JPEG", photo, {"progressive": True, "optimize": True}),
        ("JPEG", photo.convert("CMYK"), {}),
        ("JPEG", photo.convert("L"), {}),
        ("WEBP", photo, {"quality": 70}),
        ("WEBP", alpha, {"lossless": True}),
        ("WEBP", photo, {"save_all": True, "append_images": frames}),
        ("GIF", photo, {}),
        ("GIF", photo, {"save_all": True, "append_images": frames, "loop": 0}),
        ("TIFF", photo, {}),
        ("TIFF", photo, {"compression": "tiff_lzw"}),
        ("TIFF", deep, {}),
        ("TIFF", photo, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", photo, {"compression": "jpeg"}),
        ("TIFF", photo.convert("1"), {"compression": "group4"}),
        ("TIFF", photo, {"compression": "packbits"}),
        ("BMP", photo, {}),
        ("BMP", photo.convert("P"), {}),
        ("BMP", photo.convert("1"), {}),
        ("PPM", photo, {}),
    ]
    if features.check("avif"):
        wanted.append(("AVIF", photo, {}))
    if features.check("jpg_2000"):
        wanted.append(("JPEG2000", photo, {}))
    files = []
    for kind, picture, options in wanted:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files.append((kind, file.getvalue()))
    return files


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def damage_header(data: bytearray, rng: random.Random) -> bytearray:
    """Sizes, offsets, tags and counts stand at the beginning."""
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(min(len(data), 64))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def plant_number(data: bytearray, rng: random.Random) -> bytearray:
    """A length or offset that is far off, in either byte order."""
    width = rng.choice("HI")
    limit = 2 ** (16 if width == "H" else 32)
    number = rng.choice((0, 1, limit - 1, limit // 2, limit // 2 - 1, 65500, rng.randrange(limit))) % limit
    place = rng.randrange(max(1, len(data) - 4))
    planted = struct.pack(rng.choice("<>") + width, number)
    data[place : place + len(planted)] = planted
    return data


def shuffle_pieces(data: bytearray, rng: random.Random) -> bytearray:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    piece = data[a:b]
    action = rng.choice(("drop", "repeat", "move", "zero", "random"))
    if action == "drop":
        return data[:a] + data[b:]
    if action == "repeat":
        return data[:b] + piece * rng.randint(1, 20) + data[b:]
    if action == "move":
        return piece + data[:a] + data[b:]
    data[a:b] = bytes(len(piece)) if action == "zero" else rng.randbytes(len(piece))
    return data


def mend_png(data: bytearray) -> bytearray:
    """Give the chunks of a PNG their right checksums, so that what was done to them reaches the decoder."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return data


MUTATIONS = (truncate, flip_bits, flip_bits, damage_header, damage_header, plant_number, plant_number, shuffle_pieces)


def mutated(seed: int, number: int, files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Kind and content of one file."""
    rng = random.Random(seed * 1_000_003 + number)
    kind, content = files[number % len(files)]
    data = bytearray(content)
    for mutation in rng.sample(MUTATIONS, rng.choice((1, 1, 1, 2, 3))):
        data = mutation(data, rng) or bytearray(b"\0")
    if kind == "PNG" and rng.random() < 0.7:
        data = mend_png(data)
    return kind, bytes(data)


def check(image: bytes | Path) -> bool:
    """Was it read? Whatever else happens is an error."""
    try:
        pixels = load_image(image, "a picture")
    except ImageError as error:
        if not str(error).startswith("a picture: ") or len(str(error)) > 1000:
            raise RuntimeError(f"not a message for users: {error}") from error
        return False
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise RuntimeError(f"not a picture: {tuple(pixels.shape)}")
    return True


def memory() -> float:
    """Most memory that was resident so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arm(seconds: float, clock: int) -> None:
    """Set the limits of time afresh. They kill the process: a decoder that hangs hears nothing else."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(clock)


def run(count: int, seed: int, folder: Path) -> dict:
    """Load so many files under limits of time and memory."""
    arm(SECONDS, CLOCK)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    files = seeds()
    if not all(check(content) for _, content in files):
        raise RuntimeError("a good file was refused")
    before, counted = memory(), {True: 0, False: 0}
    slowest = (0.0, "")
    with (folder / "number").open("w") as current:
        for number in range(count):
            current.seek(0)
            current.write(f"{number}\n")
            current.flush()
            kind, image = mutated(seed, number, files)
            if number // len(files) % 2:
                (folder / "picture").write_bytes(image)
                image = folder / "picture"
            arm(SECONDS, CLOCK)
            start = time.process_time()
            try:
                counted[check(image)] += 1
            except BaseException:
                print(f"{kind}, file {number} of seed {seed}", file=sys.stderr)
                raise
            slowest = max(slowest, (time.process_time() - start, f"{kind} {number}"))
    arm(0, 0)
    return {"read": counted[True], "refused": counted[False], "slowest": slowest, "megabytes": memory() - before}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
