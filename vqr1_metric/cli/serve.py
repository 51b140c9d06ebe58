"""``vqr1 serve``: score pictures over HTTP, with a page to try it."""

from __future__ import annotations

import argparse
import os
import sys

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_model_options, build_scorer, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
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
        import uvicorn

        from vqr1_metric.serve.app import KEY_VARIABLE, create_app
        from vqr1_metric.serve.limits import Limits
    except ImportError as error:
        raise CommandError(f"vqr1 serve needs {error.name}: pip install 'vqr1-metric[serve]'") from None
    limits = Limits(
        pictures=args.max_pictures,
        body_bytes=args.max_mib << 20,
        pixels=args.max_megapixels * 1_000_000,
        requests=args.max_requests,
    )
    scorer = build_scorer(args)
    _ = scorer.backend  # fails here, in one line, rather than in the log of a server that starts
    app = create_app(scorer, limits, wait_seconds=args.wait_ms / 1000)
    if args.host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get(KEY_VARIABLE):
        print(f"vqr1: warning: open to the network without a key; set {KEY_VARIABLE} to ask for one", file=sys.stderr)
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    uvicorn.Server(config).run()
    return 0
