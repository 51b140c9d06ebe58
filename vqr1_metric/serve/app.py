"""The routes of ``vqr1 serve``."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from torch import Tensor

from vqr1_metric import __version__
from vqr1_metric.images import ImageError
from vqr1_metric.protocol import PROMPT_VERSION
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import QualityScorer
from vqr1_metric.serve import schema
from vqr1_metric.serve.batching import Batcher
from vqr1_metric.serve.gate import Gate
from vqr1_metric.serve.intake import OPENAPI_BODY, JsonPictures, Picture, decode, open_picture, read_pictures
from vqr1_metric.serve.limits import Limits
from vqr1_metric.serve.metrics import CONTENT_TYPE, Metrics

#: If this environment variable is set, requests must carry its value as ``Authorization: Bearer ...``.
KEY_VARIABLE = "VQR1_API_KEY"
_PAGE = Path(__file__).parent / "page"

_ERRORS = {
    400: {"description": "Malformed request"},
    401: {"description": "Missing or wrong API key"},
    408: {"description": "The request arrived too slowly"},
    413: {"description": "Too many pictures or bytes"},
    415: {"description": "Unknown content type"},
    422: {"description": "None of the pictures can be scored; the body is the usual one and says why"},
    503: {"description": "Busy; Retry-After says when to come again"},
}
Level = Annotated[float, Query(gt=0, lt=1, description="Probability of `interval`.")]
Distribution = Annotated[bool, Query(description="Send the whole distribution.")]


def create_app(scorer: QualityScorer, limits: Limits | None = None, *, wait_seconds: float = 0.005) -> FastAPI:
    """The service as an ASGI application.

    Args:
        scorer: the model; it loads when the application starts, if it was not.
        limits: what clients may ask for.
        wait_seconds: how long a picture waits for others to share a batch with.
    """
    limits = limits or Limits()
    key = os.environ.get(KEY_VARIABLE, "")
    metrics = Metrics()
    service = _Service(scorer, limits, metrics, wait_seconds)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(
                401, "Expected the API key as 'Authorization: Bearer ...'.", {"WWW-Authenticate": "Bearer"}
            )

    # The usual pages at /docs load their scripts from another site.
    app = FastAPI(
        title="vqr1 serve",
        version=__version__,
        summary="Picture quality on a scale of 1 to 5, without a reference.",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
    )
    app.add_middleware(Gate, metrics=metrics, requests=limits.requests)
    scoring = {"dependencies": [Depends(check_key)], "openapi_extra": OPENAPI_BODY, "responses": _ERRORS}

    @app.post("/v1/score", **scoring)
    async def score(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Scores:
        """Score pictures, in the order sent."""
        results = await service.score(request, response)
        return schema.Scores(
            model=service.model, results=[schema.picture_score(r, level, distribution) for r in results]
        )

    @app.post("/v1/rank", **scoring)
    async def rank(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Ranking:
        """Score pictures and order them, with the probability of every comparison."""
        results = await service.score(request, response)
        scores = [schema.picture_score(r, level, distribution) for r in results]
        return schema.Ranking(model=service.model, results=scores, **schema.ranking(results))

    @app.post("/v1/explain", **scoring)
    async def explain(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Scores:
        """Score pictures after reasonings that the model writes, where it writes any; much slower."""
        results = await service.score(request, response, explain=True)
        return schema.Scores(
            model=service.model, results=[schema.picture_score(r, level, distribution) for r in results]
        )

    @app.get("/v1/info")
    async def info() -> schema.Info:
        """The model and the limits."""
        return schema.Info(model=service.model, version=__version__, key_required=bool(key), limits=asdict(limits))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answers once the model is loaded."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE))
    describe = app.openapi

    def openapi() -> dict:
        description = describe()
        # The bodies are read by hand, as they arrive, so their schema is added by hand too.
        schemas = description["components"]["schemas"]
        added = JsonPictures.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(added.pop("$defs", {}))
        schemas["JsonPictures"] = added
        return description

    app.openapi = openapi
    return app


class _Service:
    """What the routes share: one thread that decodes, one that scores."""

    def __init__(self, scorer: QualityScorer, limits: Limits, metrics: Metrics, wait_seconds: float) -> None:
        self._scorer, self._limits, self._metrics, self._wait = scorer, limits, metrics, wait_seconds

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load the model; at the end score what is queued."""
        # Also measures the spellings of answers, so that the first request is as fast as the next.
        await asyncio.to_thread(self._scorer.backend.sequence_length, 1, False)
        self._room = _Room(self._limits.decoded_pixels)
        self._batcher = Batcher(self._scorer, wait_seconds=self._wait, observe=self._metrics.observe_batch)
        self._metrics.watch_waiting(lambda: self._batcher.waiting)
        # Pillow is made quiet with warnings.catch_warnings, which is for one thread at a time.
        with ThreadPoolExecutor(1, "vqr1-decoding") as self._decoding:
            yield
            await asyncio.to_thread(self._batcher.close)

    @property
    def model(self) -> schema.Model:
        """What the scores are made with; of a local folder only its name, the rest is nobody's business."""
        backend = self._scorer.backend
        name = Path(backend.model_id).name if Path(backend.model_id).is_absolute() else backend.model_id
        return schema.Model(name=name, revision=backend.revision, mode=self._scorer.mode, prompt=PROMPT_VERSION)

    async def score(self, request: Request, response: Response, *, explain: bool = False) -> list[ImageScore]:
        """The results for the pictures of a request; if there is not one score among them, the status is 422."""
        async with read_pictures(request, self._limits) as pictures:
            results = await asyncio.gather(*(self._score_one(picture, explain) for picture in pictures))
        scored = sum(result.error is None for result in results)
        self._metrics.pictures.labels("scored").inc(scored)
        self._metrics.pictures.labels("refused").inc(len(results) - scored)
        if not scored:
            response.status_code = 422
        return results

    async def _score_one(self, picture: Picture, explain: bool) -> ImageScore:
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self._decoding, open_picture, picture, self._limits)
            async with self._room.hold(image.width * image.height):
                pixels = await loop.run_in_executor(self._decoding, decode, picture, image)
                result = await self._through_model(picture.name, pixels, explain)
        except ImageError as error:
            return ImageScore.failed(picture.name, str(error))
        return replace(result, name=picture.name, error=result.error and result.error.removeprefix(f"{result.name}: "))

    async def _through_model(self, name: str, pixels: Tensor, explain: bool) -> ImageScore:
        try:
            return await asyncio.wrap_future(self._batcher.submit(pixels, explain=explain))
        except Exception:  # the batcher has logged it
            raise HTTPException(500, f"{name}: the model failed on it; the server's log says why.") from None


class _Room:
    """Bounds the pixels that are held; a picture that is larger than the bound waits until it is alone."""

    def __init__(self, total: int) -> None:
        self._total, self._held = total, 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, pixels: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._total)
            self._held += pixels
        try:
            yield
        finally:
            async with self._changed:
                self._held -= pixels
                self._changed.notify_all()
