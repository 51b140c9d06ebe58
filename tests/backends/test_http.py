"""The backend for models behind a server, against a strict stand-in with a real model, on loopback."""

import asyncio
import copy
import csv
import http.server
import json
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from chat_server import ChatServer, serving, tiny_backend
from PIL import Image

from vqr1_metric.backends.base import ModelError, Sampling, ScoringBackend
from vqr1_metric.backends.http import HttpBackend, RequestFailed, RequestRefused, ServerError
from vqr1_metric.backends.http.walk import _Place, place_of, rest_of_answer
from vqr1_metric.backends.readout import score_texts
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.cli import main
from vqr1_metric.redaction import redact
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
FAULTS = ["429", "500", "drop", "slow", "malformed", "count", "positive", "fewer", "drip", "encoding"]
FAULTS += ["deep", "list", "null", "text", "bytes", "infinite"]


@pytest.fixture(scope="module")
def model(tiny_qwen2_5_vl: Path) -> TransformersBackend:
    return tiny_backend(tiny_qwen2_5_vl)


@contextmanager
def connected(server: ChatServer, **options) -> Iterator[HttpBackend]:
    with serving(server.app()) as address, closing(HttpBackend(f"{address}/v1", **{"backoff": 0.01, **options})) as it:
        yield it


def picture(seed: int, height: int = 56, width: int = 84) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_places_and_expressions():
    for text, index in score_texts():
        for blank in ("", " ", "\n"):
            assert place_of(f"<answer>{blank}{text}</answer>") == index
            assert place_of(f"<answer>{blank}{text}") == (index if len(text) == 4 else _Place.OPEN)
    for text in ("", "<", "<answer", "<answer>", "<answer>\n", "<answer> 3.", "<answer>5.0", "<answer>\n4\n"):
        assert place_of(text) is _Place.OPEN, text
    outside = (
        "3",
        "<answer>0",
        "<answer>5.1",
        "<answer>5.01",
        "<answer>5.1</",
        "<answer>34",
        "<answer>3. ",
        "<answer>3<",
        "<answer>3 ",
        "<answer> 3\n</",
        "<answer>3</a>",
        "<answer>  3",
        "<answer>six",
    )
    for text in outside:
        assert place_of(text) is _Place.OUTSIDE, text
    assert rest_of_answer("<ans") == r"wer>[1-5]\.[0-9][0-9]</answer>"
    assert rest_of_answer("<answer>\n3.") == "[0-9][0-9]</answer>"
    assert rest_of_answer("<answer>3 ") is None


@pytest.mark.parametrize("constrained", [False, True])
def test_same_distribution_as_in_process(model: TransformersBackend, constrained: bool):
    images = [picture(1), picture(2, 28, 56)]
    with torch.no_grad():
        expected = model.distributions(images, model.pixel_config)
    server = ChatServer(model)
    with connected(server, threshold=1e-4, constrained=constrained, pixel_config=model.pixel_config) as backend:
        assert isinstance(backend, ScoringBackend) and backend.model_id == "tiny"
        got = backend.distributions(images, backend.pixel_config)
    torch.testing.assert_close(got.probabilities, expected.probabilities, atol=2e-3, rtol=0)
    torch.testing.assert_close(got.coverage, expected.coverage, atol=1e-2, rtol=0)
    torch.testing.assert_close(got.mean, expected.mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(got.tag_probability, expected.tag_probability, atol=1e-3, rtol=0)
    assert bool((expected.coverage > 0.2).all())  # there is something to compare
    assert any(chat.structured_outputs for chat in server.requests) == constrained


def test_readout_after_reasoning(model: TransformersBackend):
    replies = ["<think>It is sharp.</think>\n", "<think></think>\n\n"]
    images = [picture(1), picture(1)]
    with torch.no_grad():
        expected = model.distributions(images, model.pixel_config, replies=replies)
    with connected(ChatServer(model), threshold=2e-4, pixel_config=model.pixel_config) as backend:
        got = backend.distributions(images, backend.pixel_config, replies=replies)
    assert bool((expected.coverage > 0.2).all())
    torch.testing.assert_close(got.mean, expected.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(got.probabilities, expected.probabilities, atol=2e-2, rtol=0)


def test_threshold_saves_requests_and_lowers_coverage(model: TransformersBackend):
    coverages, counts = [], []
    for threshold in (0.2, 0.02, 0.002):
        server = ChatServer(model)
        with connected(server, threshold=threshold, pixel_config=model.pixel_config) as backend:
            coverages.append(float(backend.distributions([picture(1)], backend.pixel_config).coverage))
        counts.append(len(server.requests))
    assert coverages == sorted(coverages) and coverages[0] < coverages[2]
    assert counts == sorted(counts) and counts[0] < counts[2]


def test_picture_is_resized_as_the_model_does(model: TransformersBackend):
    image = picture(3, 61, 47)
    smooth = torch.nn.functional.avg_pool2d(image[None].float(), 9, 1, 4)[0].round().to(torch.uint8)
    config = model.pixel_config.with_limits(None, 4000)
    with torch.no_grad():
        expected = model.distributions([smooth], config)
    with connected(ChatServer(model), threshold=1e-4, pixel_config=model.pixel_config) as backend:
        got = backend.distributions([smooth.float() / 255], config)
    torch.testing.assert_close(got.mean, expected.mean, atol=0.05, rtol=0)


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_change_nothing(model: TransformersBackend, fault: str):
    server = ChatServer(model)
    with connected(server, threshold=0.05, timeout=0.7, pixel_config=model.pixel_config) as backend:
        expected = backend.distributions([picture(1)], backend.pixel_config)
        before = len(server.requests)
        server.faults = [fault, "", fault, fault]
        got = backend.distributions([picture(1)], backend.pixel_config)
        assert len(server.requests) == 2 * before - 2 + 3  # less the probe's two, plus three repeated
    assert torch.equal(got.probabilities, expected.probabilities)


def test_lasting_faults_are_an_error_without_a_score(model: TransformersBackend):
    server = ChatServer(model)
    with connected(server, tries=3, pixel_config=model.pixel_config) as backend:
        server.faults = ["500"] * 3
        with pytest.raises(ServerError, match=r"asked 3 times.*500 out of cake"):
            backend.distributions([picture(1)], backend.pixel_config)
        assert len(server.requests) == 3
    with pytest.raises(ServerError, match=r"asked 2 times.*connection failed"):
        HttpBackend("http://127.0.0.1:9/v1", tries=2, backoff=0.01).distributions([picture(1)], model.pixel_config)


def test_refusals_are_not_repeated(model: TransformersBackend):
    server = ChatServer(model)
    refused = pytest.raises(RequestRefused, match=r"refused a request with 404 .*other.* does not exist")
    with connected(server, model="other") as backend, refused:
        backend.distributions([picture(1)], backend.pixel_config)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("lack", "said"), [("states_logprobs", "states no log-probabilities"), ("continues", "does not continue")]
)
def test_falls_back_to_samples_and_says_so(model: TransformersBackend, lack: str, said: str):
    server = ChatServer(model, **{lack: False})
    with connected(server, fallback_samples=3, pixel_config=model.pixel_config) as backend:
        backend._fallback = Sampling(num_samples=3, max_new_tokens=12)
        with pytest.warns(UserWarning, match=f"{said}.*3 sampled replies"):
            read = backend.distributions([picture(1), picture(2)], backend.pixel_config)
        again = backend.distributions([picture(1)], backend.pixel_config)  # warned once
        with pytest.raises(ModelError, match="mode 'think' needs log-probabilities"):
            backend.distributions([picture(1)], backend.pixel_config, replies=["<think></think>\n"])
    assert read.coverage.tolist()[0] == again.coverage.tolist()[0]
    for row, coverage in zip(read.probabilities, read.coverage.tolist(), strict=True):
        assert bool(row.isnan().all()) == (coverage == 0)


def test_sampled_replies_have_their_own_seeds(model: TransformersBackend):
    server = ChatServer(model)
    sampling = Sampling(num_samples=3, max_new_tokens=6, seed=2)
    with connected(server, pixel_config=model.pixel_config) as backend:
        replies = backend.sample_replies([picture(1)], model.pixel_config, sampling, thinking=True, add_vision_id=True)
        again = backend.sample_replies([picture(1)], model.pixel_config, sampling, thinking=True, add_vision_id=True)
    assert replies == again and len(set(replies[0])) > 1
    assert {chat.seed for chat in server.requests} == {seed % 2**31 for seed in sampling.seeds(picture(1))}


def test_concurrency_is_bounded_and_used(model: TransformersBackend):
    server = ChatServer(model)
    with connected(server, concurrency=3, threshold=0.05, pixel_config=model.pixel_config) as backend:
        backend.distributions([picture(i) for i in range(4)], backend.pixel_config)
    assert server.most_at_a_time == 3


def test_key_stays_secret(
    model: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    server = ChatServer(model, key="s3cret-key")
    with connected(server, key_variable="MY_KEY", threshold=0.3, pixel_config=model.pixel_config) as backend:
        backend.distributions([picture(1)], backend.pixel_config)
        assert b"s3cret" not in pickle.dumps(backend) and "s3cret" not in repr(backend) + repr(backend.__dict__)
        same = pickle.loads(pickle.dumps(backend))
        same.distributions([picture(1)], backend.pixel_config)
        server.key = "another"  # the stand-in repeats the wrong key in its message
        with pytest.raises(RequestRefused, match=r"401 wrong key Bearer \*\*\*; set the environment variable MY_KEY"):
            copy.deepcopy(same).distributions([picture(1)], backend.pixel_config)
    assert "s3cret" not in caplog.text


def test_scorer_on_a_server(model: TransformersBackend):
    """Scoring, names, order and batches are the scorer's; only the model is elsewhere."""
    images = [picture(1), picture(2, 28, 56), picture(3, 56, 28)]
    scorer = QualityScorer(backend=model)
    expected = scorer.score(images)
    with connected(ChatServer(model), threshold=3e-3, pixel_config=model.pixel_config) as backend:
        remote = QualityScorer(backend=backend)
        got = remote.score(images)
        with pytest.raises(ModelError, match="gives no gradients"):
            remote.distributions([picture(1).div(255).requires_grad_()], differentiable=True)
    for a, b in zip(got, expected, strict=True):
        assert (a.name, a.error) == (b.name, None) and a.score == pytest.approx(b.score, abs=0.05)
        assert a.coverage <= b.coverage + 1e-3


def test_works_inside_an_event_loop(model: TransformersBackend):
    """As in a notebook."""

    async def cell() -> str:
        return backend.model_id

    with connected(ChatServer(model)) as backend:
        assert asyncio.run(cell()) == "tiny"


def test_command_line_on_a_server(model: TransformersBackend, tmp_path: Path, capsys: pytest.CaptureFixture):
    Image.fromarray(picture(1).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    output = tmp_path / "scores.csv"
    with serving(ChatServer(model).app()) as address:
        command = ["score", str(tmp_path / "a.png"), "--server", f"{address}/v1", "--silent"]
        assert main([*command, "-o", str(output)]) == 0
        assert main([*command, "--device", "cpu"]) == 2
    assert "--device is about a model in this process" in capsys.readouterr().err
    meta = json.loads((tmp_path / "scores.csv.meta.json").read_text())
    assert (meta["model"], meta["revision"]) == ("tiny", "served")
    row = next(csv.DictReader(output.read_text().splitlines()))
    with torch.no_grad():
        assert float(row["score"]) == pytest.approx(
            float(model.distributions([picture(1)], model.pixel_config).mean), abs=0.2
        )


def test_options_are_checked():
    for address in ("localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1", "http://x:p/v1", "http://a b/v1"):
        with pytest.raises(ValueError, match="such as http://127"):
            HttpBackend(address)
    with pytest.raises(ValueError, match="threshold between 0 and 1"):
        HttpBackend("http://x/v1", threshold=0)


# ---------------------------------------------------------------- one image's failure is not the run's


@pytest.mark.parametrize("mode", ["score", "sample"])
@pytest.mark.parametrize("status", [400, 413, 422, 500, 503])
def test_an_image_that_the_server_fails_on_is_a_row_with_the_reason(model: TransformersBackend, mode: str, status: int):
    images = [picture(1), picture(2, 84, 56), picture(3)]
    server = ChatServer(model)
    server.bad_heights = {84: status}
    with connected(server, threshold=0.2, tries=2, pixel_config=model.pixel_config) as backend:
        scorer = QualityScorer(mode=mode, backend=backend, num_samples=2, max_new_tokens=12)
        results = scorer.score(images)
    assert [result.name for result in results] == ["image 0", "image 1", "image 2"]
    assert "the prompt is too long, says tiny" in results[1].error and str(status) in results[1].error
    assert all(result.error is None or "held a score" in result.error for result in (results[0], results[2]))


@pytest.mark.parametrize("fault", ["fewer", "deep", "list", "drip"])
def test_an_image_whose_answers_stay_bad_has_no_score(model: TransformersBackend, fault: str):
    server = ChatServer(model)
    with connected(server, threshold=0.2, tries=2, timeout=1.0, pixel_config=model.pixel_config) as backend:
        scorer = QualityScorer(backend=backend)
        good = scorer.score(picture(1))[0]
        server.faults = [fault] * 2
        results = scorer.score([picture(2)])
        assert len(server.faults) == 0
        again = scorer.score(picture(1))[0]
    assert results[0].error.startswith("image 0: http") and "asked 2 times" in results[0].error
    assert math.isnan(results[0].score)
    assert again.score == good.score


def test_a_timeout_is_for_the_whole_request(model: TransformersBackend):
    server = ChatServer(model)
    with connected(server, threshold=0.2, tries=1, timeout=0.5, pixel_config=model.pixel_config) as backend:
        backend.distributions([picture(1)], model.pixel_config)
        server.faults = ["drip"]
        begun = time.monotonic()
        with pytest.raises(RequestFailed, match=r"did not answer within 0\.5 s"):
            backend.distributions([picture(2)], model.pixel_config)
        assert time.monotonic() - begun < 4.5  # all bytes would take 5


def test_what_is_wrong_with_the_server_ends_the_run(model: TransformersBackend):
    server = ChatServer(model, key="right")
    with connected(server, tries=2, threshold=0.2, pixel_config=model.pixel_config) as backend:
        with pytest.raises(RequestRefused, match="refused a request with 401"):
            QualityScorer(backend=backend).score([picture(1), picture(2)])
        server.key = ""
        scorer = QualityScorer(backend=backend)
        assert scorer.score(picture(1))[0].error is None
        server.name = "another"
        with pytest.raises(ServerError, match="answered as 'another', but before as 'tiny'"):
            scorer.score([picture(2), picture(3)])
    address = backend.base_url  # where nobody is now
    with pytest.raises(ServerError, match=r"asked 2 times.*Try again when the server is well"):
        scorer.score([picture(4)])
    assert address.startswith("http://127.0.0.1:")
    backend.close()


def test_command_line_goes_on_past_a_refused_picture(model: TransformersBackend, tmp_path: Path, capsys):
    for i, height in enumerate((56, 28, 56)):
        Image.fromarray(picture(i, height).permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    server = ChatServer(model)
    server.bad_heights = {28: 500}
    output = tmp_path / "scores.csv"
    with serving(server.app()) as address:
        options = ["--timeout", "20", "--tries", "1", "--threshold", "0.2", "--concurrency", "4", "--min-pixels", "784"]
        assert main(["score", str(tmp_path), "--server", f"{address}/v1", "-o", str(output), *options]) == 0
    rows = {Path(row["path"]).name: row["error"] for row in csv.DictReader(output.read_text().splitlines())}
    assert rows.keys() == {"0.png", "1.png", "2.png"}
    assert "500 the prompt is too long" in rows["1.png"] and not rows["0.png"] and not rows["2.png"]
    assert main(["score", str(tmp_path), "--tries", "1"]) == 2
    assert "--tries is about --server" in capsys.readouterr().err


# ---------------------------------------------------------------- keys

KEYS = ["sk-SECRET-1234", "sk-SECRET-1234\r", "sk-SECRET-1234\r\n", "\nsk-SECRET-1234 ", "sk-SECRET-\u00e91234"]
KEYS += ["sk-SECRET\t1234", "sk-SECRET\n1234-second", "sk-SECRET\x001234", "sk+SECRET/1234==", "sk'SECRET\"1234\\"]


@pytest.mark.parametrize("key", [key for key in KEYS if "\0" not in key])
def test_no_form_of_a_key_gets_out(
    model: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VQR1_SERVER_KEY", key)
    server = ChatServer(model, key="another")  # repeats what it was sent in its message
    said = []
    with connected(server, tries=1) as backend:
        for call in (lambda: backend.model_id, lambda: backend.distributions([picture(1)], model.pixel_config)):
            try:
                call()
            except ServerError as error:
                said += [str(error), repr(error), "".join(traceback.format_exception(error)), str(pickle.dumps(error))]
        said += [repr(backend), repr(backend.__dict__), str(pickle.dumps(backend)), caplog.text]
    assert len(said) > 4
    for text in said:
        assert "SECRET" not in text and "1234" not in text, text


def test_redaction_of_random_keys(monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(1, 127)] + ["é", "\u2028", "\udce9", "漢"]
    for _ in range(300):
        key = "".join(rng.choice(alphabet) for _ in range(rng.randint(8, 30)))
        if not key.strip():
            continue
        monkeypatch.setenv("VQR1_API_KEY", key)
        core = key.strip()
        forms = [key, repr(key), ascii(key), json.dumps(key), repr(core), quote(core, errors="surrogateescape")]
        forms += [repr(core.encode("utf-8", "surrogateescape")), " ".join(key.split())]
        for form in forms:
            shown = redact(f"value {form} here")
            assert core not in shown and form.strip("b'\"") not in shown, (form, shown)


def test_credentials_in_addresses_are_refused_and_never_shown():
    for address in ("http://user:pw9@host/v1", "https://host/v1?api_key=pw9", "http://user:p/pw9@host"):
        with pytest.raises(ValueError, match="Expected an address") as caught:
            HttpBackend(address)
        assert "pw9" not in str(caught.value)
    assert (
        redact("see http://user:pw9@host:80/v1 and https://a/b@2x.png")
        == "see http://***@host:80/v1 and https://a/b@2x.png"
    )
    assert redact("a basic setting of the bearers") == "a basic setting of the bearers"
    assert "pw9" not in redact("Authorization: Bearer pw9, authorization: basic pw9")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
def test_ctrl_c_ends_requests_that_wait(tmp_path: Path):
    """A server that says what it has and then never answers."""
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    asked = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"data": [{"id": "tiny"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            asked.set()
            self.rfile.read()  # until the client goes away

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        command = [sys.executable, "-m", "vqr1_metric.cli", "score", str(tmp_path), "--server", address]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert asked.wait(120)
            client.send_signal(signal.SIGINT)
            _, said = client.communicate(timeout=120)
        finally:
            client.kill()
            client.wait()
            server.shutdown()
            thread.join()
    assert client.returncode == 130 and said.endswith("vqr1: interrupted\n"), said
