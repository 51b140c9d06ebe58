"""``vqr1 serve``: score pictures over HTTP, with a page to try it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_model_options, build_scorer, positive

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that the service answers to, beside localhost and addresses of numbers (repeat for more)",
    )
    parser.add_argument("--port", type=port, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument(
        "--wait-ms",
        type=float,
        default=5.0,
        metavar="MS",
        help="how long a picture waits for others to share a batch with (default: 5)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-pictures", type=positive, default=32, metavar="N", help="in a request (default: 32)")
    limits.add_argument("--max-mib", type=positive, default=64, metavar="N", help="of a request (default: 64)")
    limits.add_argument(
        "--max-megapixels", type=positive, default=50, metavar="N", help="of a picture that is sent (default: 50)"
    )
    limits.add_argument("--max-requests", type=positive, default=64, metavar="N", help="at a time (default: 64)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model, then serve until SIGTERM or Ctrl-C; what was accepted by then is finished."""
    try:
        from vqr1_metric.serve.app import KEY_VARIABLE, create_app
        from vqr1_metric.serve.limits import Limits
        from vqr1_metric.serve.run import bind, is_loopback, serve
    except ImportError as error:
        raise CommandError(f"vqr1 serve needs {error.name}: pip install 'vqr1-metric[serve]'") from None
    limits = Limits(
        pictures=args.max_pictures,
        body_bytes=args.max_mib << 20,
        pixels=args.max_megapixels * 1_000_000,
        requests=args.max_requests,
    )
    try:
        bound = bind(args.host, args.port)
    except OSError as error:
        raise UsageError(f"cannot listen on {args.host}, port {args.port}: {error.strerror or error}") from None
    with bound:
        scorer = build_scorer(args)
        _ = scorer.backend  # fails here, in one line, rather than in the log of a server that starts
        if not is_loopback(args.host) and not os.environ.get(KEY_VARIABLE, "").strip():
            print(f"vqr1: warning: open to the network without a key; set {KEY_VARIABLE}", file=sys.stderr)
        host = f"[{args.host}]" if ":" in args.host else args.host
        wait = args.wait_ms / 1000

        def make_app(stopping: Callable[[], bool]) -> FastAPI:
            print(f"vqr1: running on http://{host}:{bound.getsockname()[1]} (Ctrl-C ends it)", file=sys.stderr)
            names = [args.host, *args.allow_host]
            return create_app(scorer, limits, wait_seconds=wait, hosts=names, stopping=stopping)

        serve(make_app, bound)
    return 0


def port(text: str) -> int:
    """An argparse type: a port, 0 for any free one."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, but got {value}")
    return value
