"""The model behind a server: vLLM, SGLang or any other with OpenAI's chat completions, images and log-probabilities."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vqr1_metric.backends.base import Asked, ImageFailed, ModelError, Sampling
from vqr1_metric.backends.digests import digest_of, preprocessor_digest
from vqr1_metric.backends.http.closed import closed_distribution
from vqr1_metric.backends.http.walk import AnswerWalk, rest_of_answer
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import OPENING, VISUALQUALITY_R1, Question, parse_reply
from vqr1_metric.redaction import SERVER_KEY, redact

try:
    import httpx

    from vqr1_metric.backends.http.client import (
        ChatClient,
        Choice,
        Connection,
        Malformed,
        RequestFailed,
        RequestRefused,
        ServerError,
    )
    from vqr1_metric.backends.http.session import Session, all_of
except ImportError as error:
    raise ModelError(f"A model behind a server needs {error.name}: pip install 'vqr1-metric[http]'") from None

__all__ = ["HttpBackend", "RequestFailed", "RequestRefused", "ServerError"]

#: Qwen2.5-VL, which VisualQuality-R1 is.
QWEN2_5_VL_PIXELS = PixelConfig(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=3136,
    max_pixels=12_845_056,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
#: What OpenAI's interface and vLLM's default allow.
_TOP = 20
#: Each image asks for several alternatives at once, so that this many keep 64 requests going.
_IMAGES = 32
#: Log-probabilities of one place in two requests differ by this much at most where 16-bit arithmetic is batched anew.
_PROBE_TOLERANCE = 0.5
_Result = TypeVar("_Result")


class HttpBackend:
    """A server as a :class:`~vqr1_metric.backends.base.ScoringBackend`, for ``QualityScorer(backend=...)``.

    The score distribution is read from the probabilities of the next tokens after ``<answer>``, ``<answer>3.`` and so
    on: the first request follows the most probable answer, the others the branches above ``threshold``. For that the
    server has to state log-probabilities and to continue a reply that was begun (``continue_final_message``), which is
    checked once, before the first picture. A server that cannot is asked for ``fallback_samples`` whole replies
    instead, with a warning.

    Pictures are resized here as the model would and sent as PNG, so that a server has nothing left to resize.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``.
        model: the name it is served under; None takes the only one that is.
        threshold: branches with less of the mass, given the tag, are not expanded; what they hold is missing from
            ``coverage``. Lower is more exact and needs more requests.
        constrained: hold the server's own continuation to the grammar (vLLM's ``structured_outputs``), so that one
            request always reads a whole answer. For servers whose log-probabilities are those before the constraint
            (vLLM's default); elsewhere ``coverage`` would come out as 1.
        fallback_samples: replies for each picture where log-probabilities are not to be had.
        key_variable: environment variable that holds the API key. Only its name is kept: the key is in no file, log,
            message or pickle.
        concurrency: requests at a time, over all pictures.
        timeout, tries, backoff: of one request, see :class:`~vqr1_metric.backends.http.client.Connection`.
        pixel_config: the served model's preprocessing; Qwen2.5-VL's by default.
        extra: further fields of every request, such as ``{"priority": 1}`` for a vLLM with priority scheduling.

    Raises:
        RequestFailed, RequestRefused: when a request fails after all tries, or is refused, while the server is well. A
            scorer takes that for the failure of one image.
        ServerError: when the server cannot be reached, takes no key, or answers as another model; no score is made up.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        threshold: float = 0.005,
        constrained: bool = False,
        fallback_samples: int = 6,
        key_variable: str = SERVER_KEY,
        concurrency: int = 64,
        timeout: float = 120.0,
        tries: int = 6,
        backoff: float = 0.5,
        pixel_config: PixelConfig = QWEN2_5_VL_PIXELS,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        _check_address(base_url)
        if not 0 < threshold < 1:
            raise ValueError(f"Expected a threshold between 0 and 1, but got {threshold}.")
        if min(fallback_samples, concurrency, tries) < 1 or not timeout > 0:
            raise ValueError("Expected fallback_samples, concurrency and tries of at least 1, and a timeout above 0.")
        self._connection = Connection(base_url.rstrip("/"), key_variable, concurrency, timeout, tries, backoff)
        self._model, self._threshold, self._constrained = model, threshold, constrained
        self._fallback = Sampling(num_samples=fallback_samples)
        self._extra = dict(extra or {})
        self.pixel_config = pixel_config
        self._reads_probabilities: bool | None = None
        self._alternatives = 2  # that a place states; as many as when it was tried
        self._answers_as: str | None = None  # what its replies call the model
        self._plain = False  # does the server take OpenAI's own fields only?
        self._lock, self._session_lock = threading.Lock(), threading.Lock()
        self._session: Session | None = None

    #: A server does not say which weights it has.
    revision = "served"

    @property
    def base_url(self) -> str:
        """The server's address; it holds no credentials."""
        return self._connection.base_url

    @property
    def images_at_a_time(self) -> int:
        """So many images are asked for at a time, each by a thread of its own that waits for the answers."""
        return min(_IMAGES, self._connection.concurrency)

    @property
    def model_id(self) -> str:
        """The name the model is served under, asked for at the first use."""
        with self._lock:
            if self._model is None:
                names = self._run(lambda client: client.models())
                if len(names) != 1:
                    raise ModelError(
                        f"{self._connection.base_url}: expected one model, but it serves {', '.join(names) or 'none'}; "
                        "name the one to use."
                    )
                self._model = names[0]
            return self._model

    def identity(self) -> dict[str, object]:
        """All that decides what this backend answers, but for the pixel limits; asks the server for its model's name.

        A server does not say which weights it has, so its address stands for them. Of ``extra`` there is a hash only:
        it may hold a secret.
        """
        return {
            "server": _public_address(self._connection.base_url),
            "served_model": self.model_id,
            "threshold": self._threshold,
            "constrained": self._constrained,
            "fallback_samples": self._fallback.num_samples,
            "extra": digest_of(json.dumps(self._extra, sort_keys=True, default=repr)) if self._extra else None,
            "preprocessor": preprocessor_digest(self.pixel_config),
        }

    def sequence_length(self, visual_tokens: int, thinking: bool, question: Question = VISUALQUALITY_R1) -> int:
        """1: the server makes its own batches, so a call may hold as many pictures as there are."""
        return 1

    def distributions(
        self,
        images: Sequence[Asked],
        pixel_config: PixelConfig,
        *,
        replies: Sequence[str] | None = None,
        question: Question | Sequence[Question] = VISUALQUALITY_R1,
    ) -> ScoreDistribution:
        """Distributions of the answers, leading shape ``(B,)``."""
        pictures = [(image,) if isinstance(image, Tensor) else image for image in images]
        if torch.is_grad_enabled() and any(one.requires_grad for picture in pictures for one in picture):
            raise ModelError("A model behind a server gives no gradients: use a local one for differentiable scores.")
        if question is not VISUALQUALITY_R1:
            asked = [question] * len(images) if isinstance(question, Question) else list(question)
            return self._closed(pictures, pixel_config, asked)
        if not self._can_read():
            if replies is not None:
                raise ModelError(
                    f"{self._connection.base_url}: mode 'think' needs log-probabilities; use mode 'sample'."
                )
            return self._from_samples([picture[0] for picture in pictures], pixel_config)
        begun = replies or [""] * len(images)

        async def run(client: ChatClient) -> list[ScoreDistribution]:
            async def one(image: Tensor, so_far: str) -> ScoreDistribution:
                chat = _chat(_data_url(image, pixel_config), thinking=replies is not None)

                async def expand(text: str, tokens: int) -> Sequence[tuple[str, Mapping[str, float]]]:
                    rest = rest_of_answer(text) if self._constrained else None
                    request = self._continue(chat, so_far + text, tokens)
                    if rest is not None:
                        request["structured_outputs"] = {"regex": rest}
                    return (await client.complete(request, self._check_steps)).steps or []

                return await AnswerWalk(expand, self._threshold).distribution()

            return await all_of(map(one, (picture[0] for picture in pictures), begun))

        return ScoreDistribution.stack(self._run(run)).to(torch.float32)

    def ask(
        self, images: Sequence[Tensor], questions: Sequence[Question | Sequence[Question]], pixel_config: PixelConfig
    ) -> list[ScoreDistribution]:
        """Several questions about each image, one after the other; caching what was read is up to the server."""
        asked = [one if isinstance(one, Question) or len(set(one)) > 1 else one[0] for one in questions]
        return [self.distributions(images, pixel_config, question=question) for question in asked]

    def _closed(
        self, pictures: Sequence[tuple[Tensor, ...]], pixel_config: PixelConfig, asked: Sequence[Question]
    ) -> ScoreDistribution:
        """Distributions of the answers to other questions than VisualQuality-R1's."""
        if not self._can_read():
            raise ModelError(f"{self._connection.base_url}: closed questions need log-probabilities of begun replies.")

        async def run(client: ChatClient) -> list[ScoreDistribution]:
            async def one(picture: tuple[Tensor, ...], question: Question) -> ScoreDistribution:
                chat = _chat([_data_url(image, pixel_config) for image in picture], thinking=False, asked=question)

                async def expand(text: str, tokens: int) -> Sequence[tuple[str, Mapping[str, float]]]:
                    request = self._continue(chat, question.opening + text, tokens)
                    return (await client.complete(request, self._check_steps)).steps or []

                return await closed_distribution(expand, question, self._threshold)

            return await all_of(map(one, pictures, asked))

        return ScoreDistribution.stack(self._run(run)).to(torch.float32)

    def sample_replies(
        self,
        images: Sequence[Tensor],
        pixel_config: PixelConfig,
        sampling: Sampling,
        *,
        thinking: bool,
        add_vision_id: bool,
        question: Question = VISUALQUALITY_R1,
    ) -> list[list[str]]:
        """K sampled replies for each picture, each request with a seed of its own, that of the local backend.

        A server that knows OpenAI's own fields only gets neither ``top_k`` nor a ``repetition_penalty`` of 1; then its
        defaults hold.
        """
        model = self.model_id

        async def run(client: ChatClient) -> list[list[str]]:
            async def one(chat: list[dict[str, Any]], seed: int) -> str:
                request = {
                    "model": model,
                    "messages": chat,
                    "max_tokens": sampling.max_new_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": seed % 2**31,  # as many bits as every server takes
                    **self._extra,
                }
                beyond = {"top_k": sampling.top_k or -1, "repetition_penalty": 1.0}
                try:
                    fields = {**request, **({} if self._plain else beyond)}
                    return (await client.complete(fields, self._check_model)).text
                except RequestRefused as error:
                    if self._plain or error.status not in (400, 422):
                        raise
                    reply = (
                        await client.complete(request, self._check_model)
                    ).text  # raises as well, if the fields were not the reason
                    self._plain = True
                    return reply

            async def replies_to(image: Tensor) -> list[str]:
                chat = _chat(_data_url(image, pixel_config), thinking, add_vision_id, question)
                return await all_of(one(chat, seed) for seed in sampling.seeds(image))

            return await all_of(map(replies_to, images))

        return self._run(run)

    def cancel(self) -> None:
        """End all requests that are running, for a caller that is interrupted."""
        if self._session is not None:
            self._session.cancel()

    def close(self) -> None:
        """Close the connections; the next use opens new ones."""
        with self._session_lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_session", "_session_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._session_lock = threading.Lock(), threading.Lock()
        self._session = None

    def __repr__(self) -> str:
        return f"HttpBackend({self._connection.base_url!r}, {self._model!r})"

    # ---------------------------------------------------------------- what the server can do

    def _can_read(self) -> bool:
        """Does it state log-probabilities and continue a reply? Tried once, on a plain picture."""
        model = self.model_id
        with self._lock:
            if self._reads_probabilities is None:
                try:
                    why = self._run(self._why_unreadable)
                except ImageFailed as error:  # there is nothing wrong with that picture
                    raise ServerError(str(error)) from None
                self._reads_probabilities = why is None
                if why is not None:
                    warnings.warn(
                        f"{self._connection.base_url} ({model}) {why}, so scores come from "
                        f"{self._fallback.num_samples} sampled replies a picture: slower, and not deterministic.",
                        UserWarning,
                        stacklevel=5,
                    )
            return self._reads_probabilities

    def _check_model(self, choice: Choice) -> None:
        """All replies come from one model: a server that is exchanged behind its address would mix scores of two."""
        if choice.model is None:
            return
        if self._answers_as is None:
            self._answers_as = choice.model
        if choice.model != self._answers_as:
            raise ServerError(
                f"{self._connection.base_url} answered as {choice.model!r}, but before as {self._answers_as!r}: scores "
                "of two models must not be mixed."
            )

    def _check_steps(self, choice: Choice) -> None:
        """A reply without its alternatives would look like a sure one."""
        self._check_model(choice)
        if not choice.steps or choice.alternatives < self._alternatives:
            raise Malformed(f"{choice.alternatives} alternatives a token, where it stated {self._alternatives} before")

    async def _why_unreadable(self, client: ChatClient) -> str | None:
        chat = _chat(_data_url(torch.full((3, 56, 56), 128, dtype=torch.uint8), self.pixel_config), thinking=False)
        try:
            whole = await client.complete(self._continue(chat, "", 4), self._check_model)
            if not whole.steps or whole.alternatives < 2:
                return "states no log-probabilities"
            self._alternatives = whole.alternatives
            if len(whole.steps) < 2:
                return None  # the reply is one token, so there is nothing to continue
            token, following = whole.steps[0][0], whole.steps[1][1]
            again = await client.complete(self._continue(chat, token, 1), self._check_model)
        except RequestRefused as error:
            if error.status not in (400, 422):
                raise
            return f"takes no requests for log-probabilities of a reply that was begun ({error})"
        best = max(following, key=lambda token: following[token])
        there = again.steps[0][1].get(best, 0.0) if again.steps else 0.0
        factor = torch.tensor(_PROBE_TOLERANCE).exp().item()
        if not following[best] / factor <= there <= following[best] * factor:
            return "does not continue a reply that was begun"
        return None

    def _continue(self, chat: list[dict[str, Any]], text: str, tokens: int) -> dict[str, Any]:
        """A request for the most probable ``tokens`` after a reply that begins with ``text``."""
        begun = [{"role": "assistant", "content": text}] if text else []
        return {
            "model": self._model,
            "messages": [*chat, *begun],
            "max_tokens": tokens,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "top_logprobs": _TOP,
            "add_generation_prompt": not text,
            "continue_final_message": bool(text),
            **self._extra,
        }

    def _from_samples(self, images: Sequence[Tensor], pixel_config: PixelConfig) -> ScoreDistribution:
        replies = self.sample_replies(images, pixel_config, self._fallback, thinking=False, add_vision_id=False)
        scores = torch.tensor([[parse_reply(text).score for text in texts] for texts in replies])
        tagged = torch.tensor([[float(OPENING in text) for text in texts] for texts in replies])
        read = ScoreDistribution.from_samples(scores)
        return ScoreDistribution(read.probabilities, read.coverage, tagged.mean(-1))

    def _run(self, work: Callable[[ChatClient], Awaitable[_Result]]) -> _Result:
        with self._session_lock:
            if self._session is None or self._session.process != os.getpid():
                self._session = Session(self._connection)
                weakref.finalize(self, self._session.close)
            session = self._session
        return session.run(work)


def _public_address(url: str) -> str:
    """An address in one spelling."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port and parts.port != {"http": 80, "https": 443}[parts.scheme] else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _check_address(base_url: str) -> None:
    """Raise for an address that no request can go to. Credentials are not repeated."""
    parts = urlsplit(base_url)
    if "@" in base_url or parts.query or parts.fragment:
        raise ValueError(
            "Expected an address without user name, password or query, such as http://127.0.0.1:8000/v1; a key is read "
            f"from the environment variable {SERVER_KEY}."
        )
    try:
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        fits = False
    if not fits or not base_url.isprintable() or " " in base_url:
        raise ValueError(f"Expected an address such as http://127.0.0.1:8000/v1, but got {redact(base_url)!r}.")


def _chat(
    pictures: str | Sequence[str], thinking: bool, add_vision_id: bool = False, asked: Question = VISUALQUALITY_R1
) -> list[dict[str, Any]]:
    """The chat of a question, its images as addresses."""
    urls = iter([pictures] if isinstance(pictures, str) else pictures)
    chat = asked.messages(thinking)
    content = [
        {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
        for part in chat[-1]["content"]
    ]
    if add_vision_id:
        content.insert(0, {"type": "text", "text": "Picture 1: "})
    return [*chat[:-1], {**chat[-1], "content": content}]


def _data_url(image: Tensor, config: PixelConfig) -> str:
    """A picture ``(3, H, W)`` at the size the model takes, as a PNG in a data URL."""
    values = image.detach().float() / (1 if image.is_floating_point() else 255)
    size = config.target_size(*values.shape[-2:])
    if size != tuple(values.shape[-2:]):
        values = interpolate(values[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
    pixels = (values.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
