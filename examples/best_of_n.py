"""Make n pictures of a prompt, drop the unpromising half early, keep the best.

    python examples/best_of_n.py

runs in seconds on a CPU, with a random pipeline and the embedded model. The same for real pictures, on a GPU:

    python examples/best_of_n.py --pipe stabilityai/stable-diffusion-xl-base-1.0 --model TianheWu/VisualQuality-R1-7B
    python examples/best_of_n.py --pipe black-forest-labs/FLUX.1-dev --model TianheWu/VisualQuality-R1-7B --steps 28
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from vqr1_metric import QualityScorer
from vqr1_metric.integrations.diffusers import BestOfN


def load_pipe(name: str, device: str, offload: bool) -> Any:
    """A pipeline of the Hub, or the tiny one."""
    if name == "tiny":
        torch.set_num_threads(1)  # so small that threads would only wait for each other
        from tiny_pipeline import tiny_stable_diffusion

        return tiny_stable_diffusion().to(device)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a lighthouse at dusk")
    parser.add_argument("--pipe", default="tiny", help="name on the Hugging Face Hub, folder, or tiny")
    parser.add_argument("--model", default="nano", help="scoring model")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--preview-at", type=float, default=0.4, help="share of the steps before the previews")
    parser.add_argument("--survivors", type=float, default=0.5, help="share of the candidates that are finished")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="height and width in pixels; by default the pipe's own")
    parser.add_argument("--batch-size", type=int, default=4, help="candidates in one call of the pipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--offload", action="store_true", help="keep the parts of the pipe on the CPU while not in use")
    parser.add_argument("--out", type=Path, default=Path("best_of_n.png"))
    options = parser.parse_args(arguments)

    pipe = load_pipe(options.pipe, options.device, options.offload)
    best = BestOfN(pipe, QualityScorer(options.model, device=options.device), batch_size=options.batch_size)
    size = options.size or (128 if options.pipe == "tiny" else None)
    out = best(
        options.prompt,
        n=options.n,
        keep=options.keep,
        preview_at_ratio=options.preview_at,
        survivors=options.survivors,
        seed=options.seed,
        num_inference_steps=options.steps,
        **({} if size is None else {"height": size, "width": size}),
    )

    print("seed  preview  final")
    for record in out.records:
        final = f"{record.score:.3f}" if record.survived else "dropped"
        print(f"{record.seed:4d}  {record.preview_score:7.3f}  {final}")
    print(f"kept seeds {out.seeds}; the first beats the second with probability {out.win_probability:.2f}")
    seconds = f"{out.total_seconds:.1f} s, of which scoring {out.scoring_seconds:.1f} s"
    print(f"{out.strategy}: {out.denoiser_rows} denoiser rows, {seconds}")
    out.grid().save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
