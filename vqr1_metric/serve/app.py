"""The routes of ``vqr1 serve``."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from torch import Tensor

from vqr1_metric import __version__
from vqr1_metric.images import ImageError
from vqr1_metric.protocol import PROMPT_VERSION
from vqr1_metric.redaction import SERVICE_KEY as KEY_VARIABLE
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import QualityScorer
from vqr1_metric.serve import schema
from vqr1_metric.serve.batching import Batcher
from vqr1_metric.serve.gate import Gate, error_answer
from vqr1_metric.serve.intake import OPENAPI_BODY, JsonPictures, Picture, decode, open_picture, read_json, read_pictures
from vqr1_metric.serve.limits import Limits
from vqr1_metric.serve.metrics import CONTENT_TYPE, Metrics
from vqr1_metric.serve.reward_clients import REWARD, RewardAnswer, RewardBatch, answer_for

__all__ = ["KEY_VARIABLE", "create_app"]

_PAGE = Path(__file__).parent / "page"
_DECODERS = min(4, os.cpu_count() or 1)


def _described(description: str) -> dict[str, Any]:
    return {"description": description, "model": schema.Problem}


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: _described("Malformed request"),
    401: _described("Missing or wrong API key"),
    403: _described("Another host's name, or a page of another site"),
    408: _described("The request arrived too slowly"),
    413: _described("Too many pictures or bytes"),
    415: _described("Unknown content type"),
    422: {"description": "None of the pictures can be scored; the body is the usual one and says why"},
    500: _described("The model failed on a picture"),
    503: _described("Busy; Retry-After says when to come again"),
}
Level = Annotated[float, Query(gt=0, lt=1, description="Probability of `interval`.")]
Distribution = Annotated[bool, Query(description="Send the whole distribution.")]


def create_app(
    scorer: QualityScorer,
    limits: Limits | None = None,
    *,
    wait_seconds: float = 0.005,
    hosts: Iterable[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The service as an ASGI application. If ``VQR1_API_KEY`` is set, scoring needs it.

    Args:
        scorer: the model; it loads when the application starts, if it was not.
        limits: what clients may ask for.
        wait_seconds: how long a picture waits for others to share a batch with.
        hosts, stopping: see :class:`~vqr1_metric.serve.gate.Gate`.
    """
    limits = limits or Limits()
    key = os.environ.get(KEY_VARIABLE, "").strip()
    accepted = [f"Bearer {key}".encode(encoding, "surrogateescape") for encoding in _encodings(key)]
    metrics = Metrics()
    service = _Service(scorer, limits, metrics, wait_seconds)

    def check_key(request: Request) -> None:
        given = dict(request.scope["headers"]).get(b"authorization", b"").strip()
        # All are compared, so that the time says nothing.
        if key and not sum(hmac.compare_digest(given, known) for known in accepted):
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
    app.add_middleware(Gate, metrics=metrics, requests=limits.requests, hosts=hosts, stopping=stopping)
    scheme = [Depends(HTTPBearer(auto_error=False))] if key else []  # for the description
    guarded: dict[str, Any] = {"dependencies": [*scheme, Depends(check_key)], "responses": _ERRORS}
    scoring = {**guarded, "openapi_extra": OPENAPI_BODY}

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> Response:
        return error_answer(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def explain_usage(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_answer(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")

    @app.post("/v1/score", **scoring)
    async def score(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Scores:
        """Score pictures, in the order sent."""
        return service.scores(await service.score(request, response), level, distribution)

    @app.post("/v1/rank", **scoring)
    async def rank(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Ranking:
        """Score pictures and order them, with the probability of every comparison."""
        results = await service.score(request, response)
        scores = service.scores(results, level, distribution)
        ranking = await asyncio.to_thread(schema.ranking, results)
        return schema.Ranking(model=scores.model, results=scores.results, **ranking)

    @app.post("/v1/explain", **scoring)
    async def explain(
        request: Request, response: Response, level: Level = 0.95, distribution: Distribution = False
    ) -> schema.Scores:
        """Score pictures after reasonings that the model writes, where it writes any; much slower."""
        return service.scores(await service.score(request, response, explain=True), level, distribution)

    @app.post("/score", **guarded)
    async def reward(request: Request) -> RewardAnswer:
        """Rewards for UniRL's remote reward client: protocol version 1, images only."""
        batch = await read_json(request, limits, RewardBatch)
        pictures, problems = batch.pictures(limits)
        results = await service.score_pictures(list(pictures.values()), service.client_of(request))
        return answer_for(batch, dict(zip(pictures, results, strict=True)), problems, scorer.backend.revision)

    @app.get("/v1/info")
    async def info() -> schema.Info:
        """The model and the limits."""
        return schema.Info(model=service.model, version=__version__, key_required=bool(key), limits=asdict(limits))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Answers once the model is loaded."""
        return {"status": "ok", "rewards": {REWARD: ["score"]}}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE))
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe()
        # The bodies are read by hand, as they arrive, so their schema is added by hand too.
        schemas = description["components"]["schemas"]
        for model in (JsonPictures, RewardBatch):
            added = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(added.pop("$defs", {}))
            schemas[model.__name__] = added
        body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/RewardBatch"}}}}
        description["paths"]["/score"]["post"]["requestBody"] = {"required": True, **body}
        return description

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _encodings(key: str) -> list[str]:
    """How clients write a key into a header; one that is not ASCII as either of two."""
    try:
        key.encode("latin-1")
    except UnicodeEncodeError:
        return ["utf-8"]
    return ["utf-8", "latin-1"]


class _Service:
    """What the routes share: threads that decode, one picture of a client at a time, and one that scores."""

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
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        with ThreadPoolExecutor(_DECODERS, "vqr1-decoding") as self._decoding:
            yield
            await asyncio.to_thread(self._batcher.close)

    @property
    def model(self) -> schema.Model:
        """What the scores are made with; of a local folder only its name, the rest is nobody's business."""
        card = self._scorer.card()
        name = str(card["model"])
        return schema.Model(
            name=Path(name).name if Path(name).is_absolute() else name,
            revision=str(card["revision"]),
            mode=self._scorer.mode,
            prompt=PROMPT_VERSION,
            fingerprint=f"{self._scorer.fingerprint:012x}",
        )

    def scores(self, results: list[ImageScore], level: float, distribution: bool) -> schema.Scores:
        """The answer to a request."""
        rows = [schema.picture_score(result, level, distribution) for result in results]
        return schema.Scores(model=self.model, results=rows)

    @staticmethod
    def client_of(request: Request) -> str:
        """Whose request it is, as far as is known."""
        return request.client.host if request.client else ""

    async def score(self, request: Request, response: Response, *, explain: bool = False) -> list[ImageScore]:
        """The results for the pictures of a request; if there is not one score among them, the status is 422."""
        async with read_pictures(request, self._limits) as pictures:
            results = await self.score_pictures(pictures, self.client_of(request), explain=explain)
        if all(result.error is not None for result in results):
            response.status_code = 422
        return results

    async def score_pictures(self, pictures: list[Picture], client: str, *, explain: bool = False) -> list[ImageScore]:
        """The results, in order; counted."""
        results = await asyncio.gather(*(self._score_one(picture, client, explain) for picture in pictures))
        scored = sum(result.error is None for result in results)
        self._metrics.pictures.labels("scored").inc(scored)
        self._metrics.pictures.labels("refused").inc(len(results) - scored)
        return list(results)

    async def _score_one(self, picture: Picture, client: str, explain: bool) -> ImageScore:
        loop = asyncio.get_running_loop()
        # One after the other of each client: large pictures of one hold up nobody else's.
        turn = self._turns.setdefault(client, asyncio.Lock())
        try:
            async with turn:
                image = await loop.run_in_executor(self._decoding, open_picture, picture, self._limits)
                size = image.width * image.height
            async with self._room.hold(size):
                async with turn:
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
