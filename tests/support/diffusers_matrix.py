"""Which pipelines, schedulers and strategies give the pictures that they should; the table of docs/diffusers.md.

    python tests/diffusers_matrix.py            print it
    python tests/diffusers_matrix.py --write    put it into docs/diffusers.md

For every combination: five candidates, three survivors, in calls of four. Survivors must be the pictures of an unpruned
run and those that their seeds give alone, and the denoiser must have computed as many rows as promised.
"""

import argparse
import contextlib
import io
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stub_scorer import formula_scorer
from tiny_pipelines import TinyPipe, build

from vqr1_metric.integrations.diffusers import BestOfN, BestOfNOutput
from vqr1_metric.integrations.diffusers.tested import tested

TABLE = Path(__file__).parents[2] / "docs" / "diffusers.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
TOLERANCE = 1e-5

NOISE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
#: Solvers that also take flow models; Sana and Wan are released with them.
FLOW_SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
FLOW_OPTIONS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NOISE_NAMES = {
    "sd": "Stable Diffusion 1/2",
    "lcm": "Latent consistency",
    "img2img": "SD image-to-image",
    "inpaint": "SD inpainting",
    "inpaint9": "SD inpainting, 9 channels",
    "controlnet": "SD ControlNet",
    "controlnet_img2img": "SD ControlNet image-to-image (tile)",
    "pix2pix": "SD InstructPix2Pix",
    "sd_upscale": "SD upscale",
    "upscale": "SD latent upscale",
    "sdxl": "SDXL",
    "sdxl_img2img": "SDXL image-to-image",
    "sdxl_inpaint": "SDXL inpainting",
    "sdxl_controlnet": "SDXL ControlNet",
    "sdxl_controlnet_img2img": "SDXL ControlNet image-to-image (tile)",
    "sdxl_modular": "SDXL modular",
    "pixart": "PixArt Sigma",
    "pixart_alpha": "PixArt Alpha",
}
FLOW_NAMES = {
    "sd3": "SD3",
    "flux": "Flux",
    "flux_img2img": "Flux image-to-image",
    "flux_fill": "Flux Fill",
    "flux_kontext": "Flux Kontext",
    "flux2": "Flux.2",
    "flux2_klein": "Flux.2 klein",
    "sana": "Sana",
    "qwen_image": "Qwen-Image",
    "qwen_edit": "Qwen-Image-Edit",
    "z_image": "Z-Image",
    "ltx": "LTX-Video",
    "wan": "Wan",
    "wan22": "Wan 2.2, two transformers",
}
NAMES = NOISE_NAMES | FLOW_NAMES


@dataclass
class Checked:
    """Largest differences of pixels in [0, 1] between pictures that should be equal.

    Args:
        restart, inplace: survivors against an unpruned run.
        alone: two pictures against what their seeds give in calls of their own.
        preview: previews against final pictures, to see that they resemble them; not an error.
        candidates: two candidates against each other, to see that the test could fail.
        rows: denoiser rows of plain, restart and inplace runs.
    """

    restart: float
    inplace: float
    alone: float
    preview: float
    candidates: float
    rows: tuple[int, int, int]

    @property
    def exact(self) -> bool:
        return self.worst <= TOLERANCE

    @property
    def worst(self) -> float:
        return max(self.restart, self.inplace, self.alone)


def run(tiny: TinyPipe, **options: Any) -> BestOfNOutput:
    """Best of five, three of which survive."""
    arguments = dict(tiny.arguments)
    best = BestOfN(tiny.pipe, formula_scorer(), batch_size=4)
    return best(arguments.pop("prompt"), **({"n": 5, "survivors": 3} | options), **arguments)


def check(family: str, scheduler: str | None = None, preview_at: float = 0.4) -> Checked:
    """Compare plain, restart and inplace runs of one pipe, and two candidates with their seeds alone."""
    tiny = build_with(family, scheduler)
    plain = run(tiny)
    restart, inplace = (run(tiny, preview_at_ratio=preview_at, strategy=s) for s in ("restart", "inplace"))
    some = (plain.records[1], plain.records[3])  # not the first of a call, whose generator a pipe may use for all
    if scheduler == "FlowMatchLCMScheduler":
        # These pipelines do not pass their generator on to a scheduler that draws noise; BestOfN does.
        alone = [run(tiny, n=1, survivors=1, seeds=[record.seed]).images[0] for record in some]
    else:
        alone = [make_alone(tiny, record.seed) for record in some]
    return Checked(
        *(
            max(difference(a.picture, b.picture) for a, b in zip(o.records, plain.records, strict=True) if a.survived)
            for o in (restart, inplace)
        ),
        alone=max(difference(a, record.picture) for a, record in zip(alone, some, strict=True)),
        preview=difference(restart.records[0].preview, plain.records[0].picture),
        candidates=difference(plain.records[0].picture, plain.records[1].picture),
        rows=(plain.denoiser_rows, restart.denoiser_rows, inplace.denoiser_rows),
    )


def build_with(family: str, scheduler: str | None) -> TinyPipe:
    """A pipe that gives arrays, on a scheduler with the options that the family's model needs."""
    tiny = build(family, scheduler, **(FLOW_OPTIONS if family in FLOW_NAMES and scheduler in FLOW_SOLVERS else {}))
    tiny.arguments["output_type"] = "np"
    return tiny


def runs_by_itself(family: str, scheduler: str) -> bool:
    """Does diffusers run the pipeline with that scheduler, a second time too?"""
    tiny = build_with(family, scheduler)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return all(make_alone(tiny, seed) is not None for seed in (0, 1))
    except Exception:  # that it fails by itself is the answer; what it raises differs with every pairing
        return False


def make_alone(tiny: TinyPipe, seed: int) -> np.ndarray:
    """The picture that a seed gives in a plain call of the pipe, as its user would make it."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(tiny.pipe, "blocks"):
        return tiny.pipe(**tiny.arguments, generator=generator, output="images")[0]
    output = tiny.pipe(**tiny.arguments, generator=generator)
    return output.frames[0] if hasattr(output, "frames") else output.images[0]


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())


def schedulers(family: str) -> tuple[str, ...]:
    """Every scheduler of the family's kind."""
    return FLOW_SCHEDULERS + FLOW_SOLVERS if family in FLOW_NAMES else NOISE_SCHEDULERS


def line(family: str) -> str:
    """The line of one family: it with every scheduler of its kind."""
    exact, refused, rows = [], [], ""
    for scheduler in schedulers(family):
        short = scheduler.removesuffix("Scheduler").removesuffix("Discrete").removesuffix("Multistep")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                checked = check(family, scheduler)
        except Exception as error:  # what a pipeline itself refuses differs: the table names it
            if runs_by_itself(family, scheduler):
                raise
            print(f"{family} {scheduler}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            refused.append(short)
            continue
        if not checked.exact:
            print(f"NOT EXACT: {family} with {scheduler}: {checked}", file=sys.stderr)
        rows = rows or ", ".join(map(str, checked.rows))
        exact.append(f"{short} {checked.worst:.0e}" + ("" if checked.exact else " (!)"))
    inside = "yes" if "decodes" in (tested(build(family).pipe) or ()) else "no"
    cells = [NAMES[family], inside, rows, ", ".join(exact), ", ".join(refused) or "—"]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The full matrix, one line for each family."""
    head = "| family | callback decodes | rows: plain, restart, in place | exact with | refuses |"
    return "\n".join([head, "|---" * 5 + "|", *map(line, NAMES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/diffusers.md")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = table()
    if write:
        page = TABLE.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        TABLE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
