"""From a request to checked pixels. Bytes are counted as they arrive; sizes are read from a picture's header before it
is decoded; only formats whose decoders are plain code are opened (never EPS, which runs an interpreter). A URL is never
fetched.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from vqr1_metric.images import load_image, open_image
from vqr1_metric.serve.limits import Limits

_NAME_LENGTH = 200
_Model = TypeVar("_Model", bound=BaseModel)
_Read = TypeVar("_Read")


class NamedPicture(BaseModel):
    """A picture with a name of your choice, which comes back in the result."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=_NAME_LENGTH)
    data: str = Field(description="The file, base64.")


class JsonPictures(BaseModel):
    """Pictures as base64 text, each alone or with a name. URLs are not fetched."""

    model_config = ConfigDict(extra="forbid")
    images: list[str | NamedPicture] = Field(examples=[["iVBORw0KGgo..."]])


@dataclass(frozen=True)
class Picture:
    """A picture as it was sent."""

    name: str
    file: BinaryIO


#: The request body for the OpenAPI description: what :func:`read_pictures` takes.
OPENAPI_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/JsonPictures"}},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@asynccontextmanager
async def read_pictures(request: Request, limits: Limits) -> AsyncIterator[list[Picture]]:
    """The pictures of a request: files of a form, base64 in JSON, or one picture as the body.

    Raises:
        HTTPException: 400 malformed, 408 too slow, 413 too much, 415 another content type.
    """
    length = request.headers.get("content-length", "")
    _check_size(int(length) if length.isdecimal() else 0, limits)
    pictures = await _in_time(_read(request, limits), limits)
    try:
        if not pictures:
            raise HTTPException(400, "Expected at least one picture: a file in the form, or an entry of images.")
        check_count(len(pictures), limits)
        yield pictures
    finally:
        for picture in pictures:
            picture.file.close()


async def read_json(request: Request, limits: Limits, kind: type[_Model]) -> _Model:
    """The body as JSON of this kind.

    Raises:
        HTTPException: 400 malformed, 408 too slow, 413 too much.
    """
    body = await _in_time(_body(request, limits), limits)
    try:
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise HTTPException(400, f"Malformed JSON: {where}: {first['msg']}.") from None


async def _in_time(arriving: Awaitable[_Read], limits: Limits) -> _Read:
    try:
        async with asyncio.timeout(limits.upload_seconds):
            return await arriving
    except TimeoutError:
        raise HTTPException(408, f"The request did not arrive within {limits.upload_seconds:g} s.") from None


async def _read(request: Request, limits: Limits) -> list[Picture]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form_pictures(request, limits)
    if kind == "application/json":
        return await asyncio.to_thread(_json_pictures, await _body(request, limits))
    if kind.startswith("image/"):
        return [Picture("image", io.BytesIO(await _body(request, limits)))]
    raise HTTPException(
        415, f"Expected multipart/form-data, application/json or image/*, but got {kind or 'no content type'}."
    )


def open_picture(picture: Picture, limits: Limits) -> Image.Image:
    """Read the header of a picture and check what it states; nothing is decoded.

    Raises:
        ImageError: if it is no picture, of another format, or too large.
    """
    return open_image(picture.file, picture.name, max_pixels=limits.pixels)


def decode(picture: Picture, image: Image.Image) -> Tensor:
    """The pixels ``(3, H, W)`` of an opened picture.

    Raises:
        ImageError: if it is damaged.
    """
    with image:
        return load_image(image, picture.name)


async def _form_pictures(request: Request, limits: Limits) -> list[Picture]:
    parser = MultiPartParser(request.headers, _stream(request, limits), max_files=limits.pictures, max_fields=16)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            check_count(limits.pictures + 1, limits)
        raise HTTPException(400, f"Malformed form: {error.message}") from None
    except KeyError:
        raise HTTPException(400, "Malformed form: its content type states no boundary.") from None
    files = [value for _, value in form.multi_items() if not isinstance(value, str)]
    return [Picture((file.filename or "image")[:_NAME_LENGTH], file.file) for file in files]


def _json_pictures(body: bytes) -> list[Picture]:
    try:
        entries = JsonPictures.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][:2]) or "the body"
        raise HTTPException(
            400, f'Expected {{"images": [base64, ...]}} with {{"name", "data"}} allowed; {where}: {first["msg"]}.'
        ) from None
    pictures = []
    for index, entry in enumerate(entries):
        name, text = (entry.name, entry.data) if isinstance(entry, NamedPicture) else (f"image {index}", entry)
        pictures.append(picture_of(name, text))
    return pictures


def picture_of(name: str, text: str) -> Picture:
    """A picture from base64.

    Raises:
        HTTPException: 400 for anything else.
    """
    return Picture(name, io.BytesIO(_from_base64(name, text)))


def _from_base64(name: str, text: str) -> bytes:
    if text.startswith(("http:", "https:", "file:", "ftp:")):
        raise HTTPException(400, f"{name}: URLs are not fetched; send the file itself.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(400, f"{name}: expected base64, but it holds other characters.") from None


async def _body(request: Request, limits: Limits) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, limits)])


async def _stream(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    received = 0
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(limits.stall_seconds):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise HTTPException(408, f"Nothing of the request arrived for {limits.stall_seconds:g} s.") from None
        if chunk is None:
            return
        received += len(chunk)
        _check_size(received, limits)
        yield chunk


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise HTTPException(413, f"Expected a request of at most {limits.body_bytes / (1 << 20):g} MiB.")


def check_count(count: int, limits: Limits) -> None:
    """Raise HTTPException 413 for too many pictures."""
    if count > limits.pictures:
        raise HTTPException(413, f"Expected at most {limits.pictures} pictures in one request.")
