"""`vqr1 serve` as a process: starts, says where, and finishes what it accepted when told to stop."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from stub_scorer import formula_scorer

from vqr1_metric.cli import build_parser
from vqr1_metric.serve.app import create_app

from .conftest import encoded, form

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


def test_commands_of_the_document_are_understood() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^    (?:\w+=\S+ )?(vqr1 .*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)
        assert build_parser(words[1]).parse_args(words[1:]).command == words[1]
    description = create_app(formula_scorer()).openapi()["paths"]
    paths = re.findall(r"http://127\.0\.0\.1:8000(/v1/\w+)", text) + re.findall(r"`(?:GET|POST) (/[\w/]+)`", text)
    assert len(paths) >= 8 and set(paths) <= {*description, "/openapi.json"}
    for option in re.findall(r"`(--[a-z-]+)", text.split("## A model behind")[0]):
        assert option in build_parser("serve")._subparsers._group_actions[0].choices["serve"].format_help()


def test_served_until_sigterm(tiny_qwen2_5_vl: Path) -> None:
    command = [sys.executable, "-m", "vqr1_metric.cli", "serve", "--port", "0", "--model", str(tiny_qwen2_5_vl)]
    options = ["--device", "cpu", "--wait-ms", "1500", "--max-pictures", "2"]
    environment = {**os.environ, "VQR1_API_KEY": "s3cret", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = ""
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        with httpx.Client(base_url=found[1], timeout=30, trust_env=False) as client, ThreadPoolExecutor(1) as other:
            headers = {"Authorization": "Bearer s3cret"}
            assert client.post("/v1/score", files=form(encoded())).status_code == 401
            assert client.post("/v1/score", files=form(encoded()) * 3, headers=headers).status_code == 413
            # Waits for company for 1.5 seconds, in which the server is told to stop.
            accepted = other.submit(client.post, "/v1/score", files=form(encoded()), headers=headers)
            while (
                "vqr1_waiting_pictures" not in (text := client.get("/metrics").text)
                or "active_requests 1.0" not in text
            ):
                pass
            server.send_signal(signal.SIGTERM)
            last = accepted.result()
            assert last.json()["results"][0]["error"] is None
            assert last.headers["connection"] == "close"
        said += server.communicate(timeout=15)[1]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
    assert server.returncode in (0, -signal.SIGTERM), said
    assert "s3cret" not in said


def test_what_is_wrong_with_the_address_is_said_before_a_model_loads(capsys, monkeypatch) -> None:
    from vqr1_metric import cli

    monkeypatch.setattr("vqr1_metric.cli.serve.build_scorer", lambda args: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port, "--model", "nano"]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    assert cli.main(["serve", "--port", "0", "--host", "no.such.host.invalid", "--model", "nano"]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--port", "99999"])
    assert stop.value.code == 2
