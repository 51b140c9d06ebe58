"""A strict stand-in for a vLLM server: OpenAI chat completions with a real tiny model behind, and faults on demand.

It answers what vLLM documents (log-probabilities before any constraint, `continue_final_message`, `structured_outputs`)
and refuses what vLLM refuses, so that a client that sends something else fails here too.
"""

import base64
import io
import itertools
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict

from vqr1_metric.backends.loading import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.protocol import Question, question

_NUMBERS = [f"{a}.{b}{c}" for a, b, c in itertools.product("12345", "0123456789", "0123456789")]
_ANSWERS = [f"<answer>{blank}{number}</answer>" for blank in ("", " ", "\n") for number in _NUMBERS]


class Chat(BaseModel):
    """The fields that vLLM knows of those a client may send; others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    repetition_penalty: float = 1.0
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    structured_outputs: dict[str, str] | None = None
    priority: int = 0


class ChatServer:
    """The state of one stand-in.

    Args:
        backend: the model.
        states_logprobs, continues: what the server can do; vLLM can both.
        key: if given, requests must carry it.

    ``faults`` holds what goes wrong next, first first; ``requests`` what was asked; ``bad_heights`` the status that
    images of some heights always get.
    """

    def __init__(
        self, backend: TransformersBackend, *, states_logprobs: bool = True, continues: bool = True, key: str = ""
    ) -> None:
        self.backend, self.states_logprobs, self.continues, self.key = backend, states_logprobs, continues, key
        self.other: Question | None = None  # what it may be asked besides
        self.faults: list[str] = []
        self.requests: list[Chat] = []
        self.bad_heights: dict[int, int] = {}
        self.name = "tiny"
        self.at_a_time = self.most_at_a_time = 0
        self._known: dict[tuple, torch.Tensor] = backend.__dict__.setdefault("known", {})
        self._lock = threading.Lock()

    def app(self) -> FastAPI:
        """Its two routes."""
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> dict:
            return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

        @app.post("/v1/chat/completions")
        def complete(chat: Chat, request: Request) -> Response:
            with self._lock:
                self.at_a_time += 1
                self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
                self.requests.append(chat)
                fault = self.faults.pop(0) if self.faults else ""
            try:
                if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                    raise HTTPException(401, f"wrong key {request.headers.get('authorization')}")
                return _spoiled(fault) if fault not in ("", "slow", "fewer") else self._answer(chat, fault)
            finally:
                with self._lock:
                    self.at_a_time -= 1

        @app.exception_handler(HTTPException)
        async def refuse(request: Request, error: HTTPException) -> JSONResponse:
            return JSONResponse({"error": {"message": error.detail, "code": error.status_code}}, error.status_code)

        return app

    def _answer(self, chat: Chat, fault: str) -> Response:
        if fault == "slow":
            time.sleep(1.0)
        image, thinking, begun, vision_id = self._check(chat)
        if status := self.bad_heights.get(image.shape[-2]):
            raise HTTPException(status, f"the prompt is too long, says {chat.model}")
        with self._lock:
            tokens, stated = self._generate(chat, image, thinking, begun, vision_id)
        if fault == "fewer":
            stated = [{**entry, "top_logprobs": entry["top_logprobs"][:1]} for entry in stated]
        message = {"role": "assistant", "content": self.backend.tokenizer.decode(tokens)}
        logprobs = {"content": stated} if chat.logprobs and self.states_logprobs else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length"}
        return JSONResponse({"object": "chat.completion", "model": self.name, "choices": [choice]})

    def _check(self, chat: Chat) -> tuple[torch.Tensor, bool | Question, str, bool]:
        def expect(condition: bool, message: str) -> None:
            if not condition:
                raise HTTPException(400, message)

        if chat.model != "tiny":
            raise HTTPException(404, f"The model `{chat.model}` does not exist.")
        expect(chat.top_logprobs <= 20, "Requested sample logprobs of more than max 20")
        expect(not chat.top_logprobs or chat.logprobs, "when using `top_logprobs`, `logprobs` must be set to true")
        both = chat.add_generation_prompt and chat.continue_final_message
        expect(not both, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        expect(chat.continue_final_message == (chat.messages[-1]["role"] == "assistant"), "the last role is odd")
        expect(chat.repetition_penalty == 1.0, "the model's own penalty would spoil the probabilities")
        user, *rest = chat.messages
        parts = user["content"]
        vision_id = parts[0] == {"type": "text", "text": "Picture 1: "}
        picture, text = parts[vision_id:]
        kind, _, data = picture["image_url"]["url"].partition(",")
        expect(kind == "data:image/png;base64", "expected a picture")
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        begun = rest[0]["content"] if rest else ""
        expect(len(rest) < 2 and isinstance(begun, str), "at most one begun reply")
        thinking: bool | Question = text["text"] == question(True)
        if self.other is not None and text["text"] == self.other.text:
            thinking = self.other
        expect(bool(thinking) or text["text"] == question(False), "another question")
        return torch.from_numpy(pixels).permute(2, 0, 1), thinking, begun if self.continues else "", vision_id

    @torch.no_grad()
    def _generate(self, chat: Chat, image: torch.Tensor, thinking: bool | Question, begun: str, vision_id: bool):
        backend = self.backend
        generator = torch.Generator().manual_seed(chat.seed or 0)
        ids = backend.tokenizer.encode(begun, add_special_tokens=False) if begun else []
        taken, stated = [], []
        for _ in range(chat.max_tokens):
            text = backend.tokenizer.decode(ids + taken) if ids + taken else ""
            row = self._next(image, thinking, text, vision_id)
            logits = row.clone()
            if chat.structured_outputs:
                logits[self._forbidden(chat.structured_outputs["regex"], begun, text, row)] = -torch.inf
            if chat.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / chat.temperature).softmax(-1), 1, generator=generator))
            top = row.topk(chat.top_logprobs).indices.tolist() if chat.top_logprobs else []
            stated.append({**self._stated(token, row), "top_logprobs": [self._stated(t, row) for t in top]})
            if token in backend._end_tokens:
                break
            taken.append(token)
        return taken, stated

    def _next(self, image: torch.Tensor, thinking: bool | Question, text: str, vision_id: bool) -> torch.Tensor:
        """Log-probabilities of the next token; kept, as servers do, since many requests begin alike."""
        key = (image.numpy().tobytes(), image.shape, thinking, text, vision_id)
        if key not in self._known:
            other = {"question": thinking} if isinstance(thinking, Question) else {}
            thinks = thinking is True
            inputs = self.backend._inputs([image], self.backend.pixel_config, thinks, [text], vision_id, **other)
            self._known[key] = self.backend.model(**inputs).logits[0, -1].float().log_softmax(-1)
        return self._known[key]

    def _forbidden(self, regex: str, begun: str, text: str, row: torch.Tensor) -> torch.Tensor:
        """Which tokens leave every string that the expression allows."""
        allowed = [
            answer for answer in _ANSWERS if answer.startswith(begun) and re.fullmatch(regex, answer[len(begun) :])
        ]
        assert allowed, (regex, begun)
        mask = torch.ones_like(row, dtype=torch.bool)
        for token in row.topk(60).indices.tolist():
            piece = self.backend.tokenizer.decode([token])
            mask[token] = not any(piece and answer.startswith(text + piece) for answer in allowed)
        return mask

    def _stated(self, token: int, row: torch.Tensor) -> dict[str, Any]:
        text = self.backend.tokenizer.decode([token])
        return {"token": text, "logprob": max(float(row[token]), -9999.0), "bytes": list(text.encode())}


def _spoiled(fault: str) -> Response:
    if fault == "429":
        return JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.2"})
    if fault == "500":
        return JSONResponse({"error": {"message": "out of cake"}}, 500)
    if fault == "drop":  # says more than it sends: the server closes the connection in the middle
        return StreamingResponse(iter([b'{"choices": [']), headers={"content-length": "5000"})
    if fault == "drip":  # a byte now and then, each in time for a limit on a single read
        return StreamingResponse((time.sleep(0.1) or b" " for _ in range(50)), media_type="application/json")
    if fault == "encoding":
        return Response(b"not gzip", media_type="application/json", headers={"content-encoding": "gzip"})
    bodies = {
        "deep": "[" * 200_000,
        "list": '{"choices": [{"message": {"content": "x"}, "logprobs": [1]}]}',
        "null": "null",
        "text": '{"choices": [{"message": "x"}]}',
        "bytes": '{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", "logprob": -1, '
        '"bytes": [999], "top_logprobs": []}]}}]}',
        "infinite": '{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", '
        '"logprob": NaN, "top_logprobs": null}]}}]}',
        "malformed": "<html>a proxy's page</html>",
        "count": '{"choices": []}',
        "positive": '{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", "logprob": 3, '
        '"bytes": null, "top_logprobs": []}]}}]}',
    }
    return Response(bodies[fault], media_type="application/json")


def tiny_backend(folder: Path) -> TransformersBackend:
    """A tiny model that was taught, in a few steps, to answer with scores, in all spellings."""
    backend = TransformersBackend(ModelSpec(str(folder), device="cpu"))
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    model = backend.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0)
    for _ in range(80):
        images = list(torch.randint(0, 256, (8, 3, 56, 56), generator=generator, dtype=torch.uint8))
        thinking = rng.random() < 0.4
        reasoning = rng.choice(("<think>It is sharp.</think>\n", "<think>is</think>\n\n")) if thinking else ""
        replies = [reasoning + _reply(rng) for _ in range(8)]
        inputs = backend._inputs(images, backend.pixel_config, thinking, replies, False)
        log_probs = model(**inputs).logits[:, :-1].log_softmax(-1)
        losses = [
            -log_probs[row, -length:].gather(-1, inputs["input_ids"][row, -length:, None]).mean()
            for row, length in enumerate(len(backend.tokenizer.encode(r, add_special_tokens=False)) for r in replies)
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
    backend.use_trie(backend.full_trie)
    return backend


def _reply(rng: random.Random) -> str:
    blank = rng.choice(("", "", "", " ", "\n"))
    number = f"{rng.gauss(3.4, 0.6):.{rng.choice((0, 1, 2, 2, 2))}f}"
    return f"<answer>{blank}{number}{blank}</answer><|im_end|>"


@contextmanager
def serving(app) -> Iterator[str]:
    """Run an ASGI application on a free port of loopback; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
