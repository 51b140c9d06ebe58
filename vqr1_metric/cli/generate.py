"""``vqr1 generate``: for every prompt, make n pictures with a diffusers pipeline, score them, keep the best."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_model_options, build_scorer, positive, probability
from vqr1_metric.images.names import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line")
    parser.add_argument("--pipe", required=True, metavar="NAME", help="folder of a diffusers pipeline, or Hub name")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a folder within for each prompt")
    parser.add_argument("--n", type=positive, default=8, metavar="N", help="candidates of a prompt (default: 8)")
    parser.add_argument("--keep", type=positive, default=1, metavar="K", help="pictures to keep (default: 1)")
    parser.add_argument(
        "--preview-at",
        type=probability,
        metavar="R",
        help="score previews after this share of the steps, drop the rest",
    )
    parser.add_argument(
        "--survivors", type=float, default=0.5, metavar="S", help="share that is finished (default: 0.5)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: the pipeline's)")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="of the candidates (default: 0)")
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="candidates of one call (default: 4)")
    parser.add_argument("--pipe-device", metavar="D", help="where the pipeline runs (default: as --device)")
    parser.add_argument("--pipe-dtype", choices=("float32", "float16", "bfloat16"), help="of the pipeline's weights")
    parser.add_argument("--offload", action="store_true", help="keep the pipeline's parts on the CPU while not in use")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate; 130 if it was interrupted."""
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise CommandError(f"{args.prompts} holds no prompt")
    from vqr1_metric.integrations.diffusers.best_of_n import BestOfN
    from vqr1_metric.integrations.diffusers.generate import generate, load_pipe

    best = BestOfN(
        load_pipe(args.pipe, args.pipe_device or args.device, args.pipe_dtype, args.offload),
        build_scorer(args),
        batch_size=args.batch,
    )
    height, width = args.size or (None, None)
    options = {"num_inference_steps": args.steps, "height": height, "width": width, "guidance_scale": args.guidance}
    given = {name: value for name, value in options.items() if value is not None}
    if args.preview_at is not None:
        given |= {"preview_at_ratio": args.preview_at, "survivors": args.survivors}
    try:
        for prompt, folder, output in generate(
            best, prompts, args.out, n=args.n, keep=args.keep, seed=args.first_seed, **given
        ):
            done = "done before" if output is None else ", ".join(f"{score:.2f}" for score in output.scores) or "none"
            print(f"{folder}  {done}  {printable(prompt)}", flush=True)
            if output is not None and output.interrupted is not None:
                raise KeyboardInterrupt(f"interrupted: {output.interrupted}; the same command goes on from here")
    except ValueError as error:
        raise CommandError(str(error)) from None
    return 0
