"""What `vqr1 serve` answers, to good requests and to bad ones."""

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from stub_scorer import FormulaBackend, formula_scorer

from vqr1_metric.results import rank_results
from vqr1_metric.scorer import QualityScorer
from vqr1_metric.serve.limits import Limits

from .conftest import Serve, encoded, form

PICTURES = [encoded(i) for i in range(3)]


class SlowBackend(FormulaBackend):
    """Notes how many pictures came together, and fails on pictures of one height."""

    def __init__(self, seconds: float = 0.05) -> None:
        super().__init__()
        self.seconds, self.batches = seconds, []

    def distributions(self, images, pixel_config, *, replies=None):
        time.sleep(self.seconds)
        if any(image.shape[-2] == 99 for image in images):
            raise RuntimeError("out of luck")
        self.batches.append(len(images))
        return super().distributions(images, pixel_config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> QualityScorer:
    from tiny_models import build_tiny_model

    return QualityScorer(build_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.filterwarnings("ignore:.*was this model trained.*")
def test_same_as_library_however_sent(serve: Serve, tiny: QualityScorer) -> None:
    expected = tiny.score(PICTURES)
    texts = [base64.b64encode(picture).decode() for picture in PICTURES]
    with serve(tiny) as client:
        named = {"images": [texts[0], {"name": "b", "data": texts[1]}, "data:image/png;base64," + texts[2]]}
        answers = [
            client.post("/v1/score?distribution=true&level=0.5", files=form(*PICTURES)),
            client.post("/v1/score?distribution=true&level=0.5", json=named),
        ]
        single = client.post("/v1/score", content=PICTURES[0], headers={"content-type": "image/png"}).json()["results"]
        explained = client.post("/v1/explain", content=PICTURES[0], headers={"content-type": "image/png"}).json()
        info = client.get("/v1/info").json()
    assert info["model"] == answers[0].json()["model"]
    assert info["model"]["name"] == "tiny" and info["model"]["revision"] == tiny.backend.revision
    for answer in answers:
        assert answer.status_code == 200
        for got, want in zip(answer.json()["results"], expected, strict=True):
            assert got["score"] == pytest.approx(want.score, abs=1e-4)
            assert got["std"] == pytest.approx(want.std, abs=1e-4)
            assert got["coverage"] == pytest.approx(want.coverage, abs=1e-5)
            assert got["tag_probability"] == pytest.approx(want.tag_probability, abs=1e-5)
            assert got["interval"] == pytest.approx(want.interval(0.5), abs=0.011)
            assert got["reliable"] == want.reliable and got["error"] is None
            torch.testing.assert_close(
                torch.tensor(got["probabilities"]), want.distribution.probabilities, atol=1e-4, rtol=1e-3
            )
    assert [r["name"] for r in answers[0].json()["results"]] == ["0.png", "1.png", "2.png"]
    assert [r["name"] for r in answers[1].json()["results"]] == ["image 0", "b", "image 2"]
    assert single[0]["score"] == pytest.approx(expected[0].score, abs=1e-4) and single[0]["probabilities"] is None
    assert len(explained["results"][0]["replies"]) == 6


def test_ranking_is_the_librarys(serve: Serve) -> None:
    expected = rank_results(formula_scorer().score(PICTURES))
    with serve(formula_scorer()) as client:
        answer = client.post("/v1/rank", files=form(*PICTURES)).json()
    assert [(p["rank"], p["index"], p["tied"]) for p in answer["ranking"]] == [
        (p.rank, p.index, p.tied) for p in expected
    ]
    wins = torch.tensor(answer["win_probability"])
    torch.testing.assert_close(wins + wins.T, torch.ones(3, 3), atol=1e-5, rtol=0)
    first, second = expected[0].index, expected[1].index
    assert wins[first, second] == pytest.approx(expected[0].beats_next, abs=1e-6)


def test_bad_picture_among_good_ones(serve: Serve) -> None:
    # A PNG whose header states 60000 x 60000 pixels: refused without decoding.
    header = PICTURES[0][12:16] + (60000).to_bytes(4, "big") * 2 + PICTURES[0][24:29]
    bomb = PICTURES[0][:12] + header + zlib.crc32(header).to_bytes(4, "big") + PICTURES[0][33:]
    bad = {
        "cut.png": PICTURES[0][:80],
        "empty.png": b"",
        "words.png": b"no picture at all",
        "bomb.png": bomb,
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "large.png": encoded(0, (120, 100)),
    }
    files = [("images", (name, data)) for name, data in [("good.png", PICTURES[1]), *bad.items()]]
    with serve(formula_scorer(), Limits(pixels=10_000)) as client:
        mixed = client.post("/v1/rank", files=files)
        none = client.post("/v1/score", files=files[1:])
        metrics = client.get("/metrics").text
    assert mixed.status_code == 200 and none.status_code == 422
    errors = {r["name"]: r["error"] for r in mixed.json()["results"]}
    assert errors.pop("good.png") is None
    assert none.json()["results"] == mixed.json()["results"][1:]
    assert [r["score"] for r in none.json()["results"]] == [None] * len(bad)
    reasons = ("damaged or truncated", "is empty", "but text", "0.01 megapixels", "PostScript", "it has 120x100")
    for name, reason in zip(bad, reasons, strict=True):
        assert reason in errors[name], (name, errors[name])
    assert 'vqr1_pictures_total{outcome="refused"} 12.0' in metrics
    assert 'vqr1_pictures_total{outcome="scored"} 1.0' in metrics


def test_bad_requests(serve: Serve) -> None:
    as_json = {"content-type": "application/json"}
    limits = Limits(pictures=2, body_bytes=20_000)
    with serve(formula_scorer(), limits) as client:

        def check(status: int, said: str, path: str = "/v1/score", **request) -> None:
            answer = client.post(path, **request)
            assert (answer.status_code, said in answer.text) == (status, True), answer.text
            assert answer.json()["error"]["code"] == status and set(answer.json()) == {"error"}

        check(415, "but got no content type")
        check(415, "text/plain", content=b"x", headers={"content-type": "text/plain"})
        check(400, "at least one picture", json={"images": []})
        check(400, "Expected {", content=b"[1, 2", headers=as_json)
        check(400, "Expected {", content=b"[" * 5000, headers=as_json)
        check(400, "images.0", json={"images": [7]})
        check(400, "base64", json={"images": ["!!!"]})
        check(400, "URLs are not fetched", json={"images": ["https://example.org/a.png"]})
        check(400, "Malformed form", content=b"x", headers={"content-type": "multipart/form-data"})
        check(400, "Malformed form", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"})
        check(413, "at most 2 pictures", files=form(*[b"x"] * 3))
        check(413, "at most 2 pictures", json={"images": ["AA=="] * 3})
        check(413, "MiB", content=bytes(20_001), headers={"content-type": "image/png"})
        chunks = (bytes(1000) for _ in range(100))
        check(413, "MiB", content=chunks, headers={"content-type": "image/png"})
        check(400, "less than 1", path="/v1/score?level=1", files=form(PICTURES[0]))
        assert client.get("/v1/score").json()["error"]["code"] == 405
        assert client.get("/nowhere").json() == {"error": {"code": 404, "message": "Not Found"}}
        assert client.get("/page/../app.py").status_code == 404
        assert client.get("/page/%2e%2e/app.py").status_code == 404
        assert client.post("/v1/score", files=form(PICTURES[0])).status_code == 200


def test_clients_share_batches_and_get_their_own_answers(serve: Serve) -> None:
    pictures = [encoded(i, (60 + i, 48)) for i in range(24)]
    expected = [result.score for result in formula_scorer().score(pictures)]
    backend = SlowBackend()
    with serve(QualityScorer(backend=backend)) as client, ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda picture: client.post("/v1/score", files=form(picture)).json(), pictures))
    assert [a["results"][0]["score"] for a in answers] == pytest.approx(expected, abs=1e-5)
    assert sum(backend.batches) == 24 and len(backend.batches) < 16


def test_failing_picture_does_not_take_others_with_it(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [*PICTURES, encoded(9, (60, 99))]
    with serve(QualityScorer(backend=SlowBackend(0.02)), wait_seconds=0.2) as client, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda picture: client.post("/v1/score", files=form(picture)), pictures))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 500]
    assert "the model failed on it" in answers[3].json()["error"]["message"]
    assert "out of luck" in caplog.text and "out of luck" not in answers[3].text


def test_busy_and_slow(serve: Serve) -> None:
    limits = Limits(requests=1, upload_seconds=0.5)
    begun, done = threading.Event(), threading.Event()

    def dripping():
        yield b"x"
        begun.set()
        done.wait(10)
        yield b"y"

    with serve(formula_scorer(), limits) as client, ThreadPoolExecutor(1) as other:
        slow = other.submit(client.post, "/v1/score", content=dripping(), headers={"content-type": "image/png"})
        assert begun.wait(10)
        while "vqr1_active_requests 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        busy = client.post("/v1/score", files=form(PICTURES[0]))
        while "vqr1_active_requests 0.0" not in client.get("/metrics").text:
            time.sleep(0.05)
        done.set()
        assert slow.result().status_code == 408
        assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
        assert client.post("/v1/score", files=form(PICTURES[0])).status_code == 200


def test_memory_bound_lets_every_picture_through(serve: Serve) -> None:
    with serve(formula_scorer(), Limits(decoded_pixels=3000)) as client:  # each picture holds 2880
        answer = client.post("/v1/score", files=form(*PICTURES, encoded(5, (90, 80))))
    assert [r["error"] for r in answer.json()["results"]] == [None] * 4


def test_key_and_origin(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQR1_API_KEY", "s3cret")
    with serve(formula_scorer()) as client:

        def status(**headers: str) -> int:
            return client.post("/v1/score", files=form(PICTURES[0]), headers=headers).status_code

        assert status() == status(Authorization="Bearer other") == status(Authorization="Bearer é".encode()) == 401
        assert status(Authorization="Bearer s3cret") == 200
        assert status(Authorization="Bearer s3cret", Origin="http://evil.example") == 403
        assert status(Authorization="Bearer s3cret", Origin=f"http://{client.base_url.netloc.decode()}") == 200
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/v1/info").json()["key_required"] is True
        assert "s3cret" not in client.get("/v1/info").text + client.get("/openapi.json").text


def test_page_description_and_metrics(serve: Serve) -> None:
    examples = Path(__file__).parents[2] / "examples" / "pictures"
    with serve(formula_scorer()) as client:
        page, script = client.get("/"), client.get("/page/app.js")
        same = client.get("/page/app.js", headers={"if-none-match": script.headers["etag"]})
        names = json.loads(script.text.split("EXAMPLES = ")[1].split(";")[0])
        for name in names:
            assert client.get(f"/page/examples/{name}").content == (examples / name).read_bytes()
        description = client.get("/openapi.json").json()
        client.post("/v1/score", files=form(PICTURES[0]))
        client.get("/nowhere")
        metrics = client.get("/metrics")
    assert page.status_code == 200 and "http" not in page.text.replace("http-equiv", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert script.headers["cache-control"] == "no-cache" and same.status_code == 304  # asked for, sent only when new
    assert "innerHTML" not in script.text
    assert {"/v1/score", "/v1/rank", "/v1/explain", "/score", "/v1/info", "/health", "/metrics"} == set(
        description["paths"]
    )
    body = description["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json", "image/*"}
    assert {"JsonPictures", "NamedPicture", "PictureScore"} <= set(description["components"]["schemas"])
    for line in ('vqr1_requests_total{route="/v1/score",status="200"} 1.0', 'route="other",status="404"'):
        assert line in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_accepted_requests_are_finished_at_the_end(serve: Serve) -> None:
    backend = SlowBackend(0.3)
    with ThreadPoolExecutor(4) as clients:
        with serve(QualityScorer(backend=backend)) as client:
            url = str(client.base_url)
            waiting = [
                clients.submit(httpx.post, f"{url}/v1/score", files=form(p), timeout=30, trust_env=False)
                for p in PICTURES
            ]
            while "vqr1_active_requests 3.0" not in client.get("/metrics").text:
                time.sleep(0.01)
        assert [answer.result().status_code for answer in waiting] == [200, 200, 200]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


# ---------------------------------------------------------------- hosts, other sites, slow and vanishing clients


def test_only_own_hosts_and_pages(serve: Serve) -> None:
    with serve(formula_scorer(), hosts=["quality.example"]) as client:
        own = client.base_url.netloc.decode()

        def status(path: str = "/v1/score", **headers: str) -> int:
            if path == "/v1/score":
                return client.post(path, files=form(PICTURES[0]), headers=headers).status_code
            return client.get(path, headers=headers).status_code

        for host in (
            own,
            f"localhost:{client.base_url.port}",
            "[::1]:9",
            "192.168.1.2",
            "quality.example",
            "QUALITY.example:80",
        ):
            assert status(Host=host) == status("/health", Host=host) == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[", "a@127.0.0.1:b"):
            assert status(Host=host) == status("/v1/info", Host=host) == 403, host
            assert status(Host=host, Origin=f"http://{host}") == 403
        for origin in ("http://evil.example", "null", "http://[", "", "http://", f"http://{own}.evil.example"):
            assert status(Origin=origin) == 403, origin
        assert status(Host="quality.example", Origin="http://quality.example") == 200
        assert status(Host="quality.example", Origin=f"http://{own}") == 403


def test_head(serve: Serve) -> None:
    with serve(formula_scorer()) as client:
        for path in ("/", "/health", "/metrics", "/v1/info", "/page/app.js"):
            answer = client.head(path)
            assert answer.status_code == 200 and not answer.content
            assert client.get(path).status_code == 200  # the connection is still in step
        assert client.head("/nowhere").status_code == 404


def test_clients_that_vanish_are_no_errors(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    picture = encoded(0, (600, 480))
    head = "POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\nContent-Type: {}\r\n\r\n"
    with serve(formula_scorer()) as client:
        for kind in ("image/png", "application/json", "multipart/form-data; boundary=x"):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(head.format(len(picture), kind).encode() + picture[:1000])
        deadline = time.monotonic() + 10
        while 'route="/v1/score",status="499"} 3.0' not in (metrics := client.get("/metrics").text):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.05)
        assert 'status="500"' not in metrics
        assert client.post("/v1/score", files=form(PICTURES[0])).status_code == 200
    assert "Traceback" not in caplog.text and not caplog.records


def test_slow_senders_do_not_take_all_places(serve: Serve) -> None:
    """A client of its own gets its answer while another holds as many requests open as it may."""
    limits = Limits(requests=3, stall_seconds=1.0)
    body = b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\nContent-Type: image/png\r\n\r\nx"
    with serve(formula_scorer(), limits) as client, contextlib.ExitStack() as stack:
        address = (client.base_url.host, client.base_url.port)
        slow = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3)]
        for connection in slow:
            connection.sendall(body)
        while "vqr1_active_requests 3.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=client.base_url, transport=transport, timeout=30) as other:
            assert client.post("/v1/score", files=form(PICTURES[0])).status_code == 503
            assert other.post("/v1/score", files=form(PICTURES[0])).status_code == 200
        for connection in slow:
            assert b"408" in connection.recv(4096)


def test_half_a_head_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqr1_metric.serve import run
    from vqr1_metric.serve.app import create_app

    monkeypatch.setattr(run, "HEAD_SECONDS", 0.5)
    config = uvicorn.Config(create_app(formula_scorer()), port=0, log_level="warning", http=run.TimedProtocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        for begun in (b"", whole[:20], whole + whole[:20]):  # nothing, half a head, half of the second head
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(begun)
                while connection.recv(4096):
                    pass  # ends because the service closes it
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(whole)
            received = b""
            while b'"ok"' not in received:
                piece = connection.recv(4096)
                assert piece
                received += piece
    finally:
        server.should_exit = True
        thread.join()


def test_keys_are_compared_as_bytes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQR1_API_KEY", "schlüssel\r\n")
    with serve(formula_scorer()) as client:

        def status(key: bytes) -> int:
            headers = [(b"authorization", b"Bearer " + key)]
            return client.post("/v1/score", files=form(PICTURES[0]), headers=headers).status_code

        assert status("schlüssel".encode()) == status("schlüssel".encode("latin-1")) == 200
        assert status(b"schl\xff") == status(b"x") == 401
        description = client.get("/openapi.json").json()
        assert description["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        assert description["paths"]["/v1/score"]["post"]["security"] == [{"HTTPBearer": []}]
        assert "security" not in description["paths"]["/health"]["get"]


def test_large_pictures_of_one_client_hold_up_nobody(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one client's pictures wait for their turn, another client's is decoded."""
    from vqr1_metric.serve import app

    order, decode, begun = [], app.decode, threading.Event()

    def slow(picture, image):
        if image.width > 100:
            begun.set()
            time.sleep(0.15)
        order.append(image.width)
        return decode(picture, image)

    monkeypatch.setattr(app, "decode", slow)
    monkeypatch.setattr(app, "_DECODERS", 1)
    large = [encoded(i, (200, 100)) for i in range(8)]
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with serve(formula_scorer()) as client, ThreadPoolExecutor(1) as background:
        first = background.submit(client.post, "/v1/score", files=form(*large))
        assert begun.wait(20)
        with httpx.Client(base_url=client.base_url, transport=transport, timeout=30) as other:
            assert other.post("/v1/score", files=form(PICTURES[0])).status_code == 200
        assert first.result().status_code == 200
    assert order.count(200) == 8 and order.index(60) < 5


# ---------------------------------------------------------------- reward clients


def unirl_request(picture: bytes, **fields) -> dict:
    """One sample as UniRL's remote reward client writes it."""
    history = [{"text": "a lake", "image_b64": base64.b64encode(picture).decode()}]
    return {
        "history": history,
        "required_rewards": ["visual_quality_r1"],
        "metadata": None,
        "request_id": "7",
        "sample_id": "7",
        "group_id": "g",
        "source_rank": 0,
        "policy_version": None,
        "scorer_version": None,
        "idempotency_key": "d" * 64,
    } | fields


def test_unirl_asks_and_gets_its_rewards(serve: Serve) -> None:
    expected = formula_scorer().score(PICTURES[:2])
    edited = unirl_request(PICTURES[1])
    edited["history"].insert(0, {"text": "make it sharp", "image_b64": base64.b64encode(PICTURES[2]).decode()})
    requests = [
        unirl_request(PICTURES[0]),
        edited,  # the last entry is the one to judge
        unirl_request(b"no picture"),
        unirl_request(PICTURES[0], required_rewards=["visual_quality_r1", "hpsv3"]),
        unirl_request(PICTURES[0], history=[{"text": "a clip", "video_b64": "AAAA"}]),
    ]
    with serve(formula_scorer()) as client:
        assert client.get("/health").json() == {"status": "ok", "rewards": {"visual_quality_r1": ["score"]}}
        answer = client.post("/score", json={"protocol_version": "1", "requests": requests})
        old = client.post("/score", json={"protocol_version": "2", "requests": requests})
        wrong = client.post("/score", json={"requests": [{"history": []}]})
        empty = client.post("/score", json={"protocol_version": "1", "requests": []})
    assert answer.status_code == 200
    body = answer.json()
    assert body["protocol_version"] == "1"
    rewards = [row.get("visual_quality_r1") for row in body["results"]]
    assert rewards[0]["score"] == pytest.approx(expected[0].score, abs=1e-5)
    assert rewards[1]["score"] == pytest.approx(expected[1].score, abs=1e-5)
    assert rewards[2] is None and rewards[4] is None and rewards[3] == rewards[0]
    assert body["errors"][0] == body["errors"][1] == {}
    assert "visual_quality_r1" in body["errors"][2] and "frames" in body["errors"][4]["visual_quality_r1"]
    assert body["errors"][3] == {"hpsv3": "this service does not have this reward"}
    echoed = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")
    assert [{name: row[name] for name in echoed} for row in body["identities"]] == [
        {name: sent[name] for name in echoed} for sent in requests
    ]
    assert old.status_code == 400 and "protocol_version" in old.json()["error"]["message"]
    assert wrong.status_code == 400 and "requests.0.history" in wrong.json()["error"]["message"]
    assert empty.json()["results"] == []


def test_the_documents_reward_function(serve: Serve) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = next(block for block in text.split("```python\n") if "def compute_score" in block).split("```")[0]
    names: dict = {}
    exec(compile(code, "serving.md", "exec"), names)
    image = torch.randint(0, 256, (3, 48, 60), dtype=torch.uint8)
    with serve(formula_scorer()) as client:
        for given in (image, image[None]):
            reward = asyncio.run(names["compute_score"](given, "a lake", server_url=str(client.base_url).rstrip("/")))
            assert reward["score"] == pytest.approx(formula_scorer().score(image)[0].score, abs=1e-5)
        thin = torch.zeros(3, 2, 900, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="too thin"):
            asyncio.run(names["compute_score"](thin, "", server_url=str(client.base_url).rstrip("/")))
