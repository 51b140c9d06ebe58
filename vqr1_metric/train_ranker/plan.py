"""What a run will take, before it is started: steps, memory and time, from the model's shape. Computed, not measured.

Formulas and assumptions are those of ``benchmarks/training/plan_7b.py``, which prints them for 7B.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vqr1_metric.ratings import RatingSet
from vqr1_metric.train_ranker.config import RankerConfig

#: Assumed, not derived.
REACHED = 0.4  # share of the peak reached in matrix products
BANDWIDTH_SHARE = 0.6  # share of the memory bandwidth reached in decoding
TOKEN_OVERHEAD = 0.025  # seconds of transformers for each decoded token
VLLM_TOKEN_OVERHEAD = 0.005
KERNEL = 10e-6  # seconds to start a kernel: an adapter that is not merged adds three to each linear layer
NF4_BYTES = 4.13 / 8  # of a weight in 4 bits with double quantisation

_PROMPT_TEXT = 110  # tokens of the question and its frame


@dataclass(frozen=True)
class Machine:
    """One device: its name, operations and bytes a second, bytes of memory (0: not known)."""

    name: str
    flops: float
    bandwidth: float
    memory: float = 0.0


#: Dense bfloat16 rates and bandwidths of the makers' data sheets.
MACHINES = {
    "A100": Machine("A100 80 GB", 312e12, 2.0e12, 80e9),
    "H100": Machine("H100 80 GB", 989e12, 3.35e12, 80e9),
    "H200": Machine("H200", 989e12, 4.8e12, 141e9),
    "4090": Machine("RTX 4090 24 GB", 165e12, 1.0e12, 24e9),
    "L40S": Machine("L40S", 362e12, 0.86e12, 48e9),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: parameters of both parts, and of the language model's (un)embedding.

    A tower that is no transformer has no layers, width and inner width here; what one visual token costs in it is
    counted by running it: ``tower_products`` multiplications and ``tower_kept`` numbers that its gradients need.
    """

    language: float
    vision: float
    vocabulary: float
    layers: int
    width: int
    inner: int
    kv_width: int
    vision_layers: int
    vision_width: int
    vision_inner: int
    tower_products: float = 0.0
    tower_kept: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a configuration of transformers; the weights are counted on the meta device."""
        from transformers import AutoModelForImageTextToText

        classes: Any = AutoModelForImageTextToText
        with torch.device("meta"):
            model = classes.from_config(config)
        text, vision = config.get_text_config(), config.vision_config
        visual = sum(weight.numel() for weight in model.model.visual.parameters())
        depth = getattr(vision, "depth", 0)  # the towers of Qwen-VL say it, and are transformers
        width = (getattr(vision, "embed_dim", None) or vision.hidden_size) if depth else 0
        inner = (getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)) if depth else 0
        products, kept = (0.0, 0.0) if depth else _cost_of_a_token(model.model.visual)
        head = text.hidden_size // text.num_attention_heads
        return cls(
            language=sum(weight.numel() for weight in model.parameters()) - visual,
            vision=visual,
            vocabulary=model.get_output_embeddings().weight.numel(),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            inner=text.intermediate_size,
            kv_width=text.num_key_value_heads * head,
            vision_layers=depth,
            vision_width=width,
            vision_inner=inner,
            tower_products=products,
            tower_kept=kept,
        )

    def adapter(self, rank: int, vision: bool = True) -> float:
        """Parameters of LoRA's matrices on every linear layer."""
        language = 2 * (2 * self.width) + 2 * (self.width + self.kv_width) + 3 * (self.width + self.inner)
        of_vision = 6 * self.vision_width + 3 * (self.vision_width + self.vision_inner)
        return rank * (self.layers * language + self.vision_layers * of_vision * vision)


def _cost_of_a_token(tower: Any) -> tuple[float, float]:
    """Multiplications, and numbers kept for the backward pass, of one visual token of a tower on the meta device."""
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    config, side = tower.config, 8
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no address is used twice
    counter = FlopCounterMode(display=False)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage
        return tensor

    patches = (side * config.spatial_merge_size) ** 2
    pixels = torch.empty(patches, 3 * config.temporal_patch_size * config.patch_size**2, device="meta")
    grid = torch.tensor([[1, side * config.spatial_merge_size, side * config.spatial_merge_size]])
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        tower.float()(pixels, grid_thw=grid)
    numbers = sum(storage.nbytes() for storage in kept.values()) / pixels.element_size()
    return counter.get_total_flops() / 2 / side**2, numbers / side**2


@dataclass(frozen=True)
class Plan:
    """A step: so many pictures on each of so many devices, K replies each, and how the weights are held.

    Args:
        machine, devices, shape: where and what.
        visual_tokens: of a picture.
        sampled: replies are sampled; otherwise the answer tree is read.
        images, replies, micro_batch, reply_tokens: of a device.
        lora_rank, four_bit, sharded, weight_bytes, vision_trained, vllm: of the weights.
    """

    machine: Machine
    devices: int
    shape: Shape
    visual_tokens: float
    sampled: bool = True
    images: int = 8
    replies: int = 6
    micro_batch: int = 48
    reply_tokens: int = 256
    lora_rank: int = 0
    four_bit: bool = False
    sharded: bool = True
    weight_bytes: float = 2.0
    vision_trained: bool = True
    vllm: bool = False

    @property
    def rows(self) -> int:
        """Sequences of a step on a device."""
        return self.images * (self.replies if self.sampled else 1)

    @property
    def sequence(self) -> float:
        """Tokens of one; the answer tree has about 54."""
        return self.visual_tokens + _PROMPT_TEXT + (self.reply_tokens if self.sampled else 54)

    def weights(self) -> float:
        """Bytes of the frozen weights as they are held."""
        s, parameters = self.shape, self.shape.language + self.shape.vision
        if not self.four_bit:
            return parameters * self.weight_bytes
        sixteen = 2 * s.vocabulary  # embedding and head keep 16 bits
        return (parameters - sixteen) * NF4_BYTES + sixteen * 2

    def memory(self) -> dict[str, float]:
        """Bytes on one device, at the two peaks."""
        s, parameters = self.shape, self.shape.language + self.shape.vision
        parts = self.devices if self.sharded else 1
        if self.lora_rank:
            held, reference = self.weights() + s.adapter(self.lora_rank, self.vision_trained) * 16, 0.0
        elif self.weight_bytes == 2.0:  # 16-bit weight and gradient, float32 master weight and two moments
            held, reference = parameters * 16 / parts, parameters * 2 / parts
        else:  # float32 throughout
            held, reference = parameters * 16 / parts, parameters * 4 / parts
        held += parameters * 2 if self.vllm else 0  # vLLM's own copy
        gathered = parameters * 2 if self.sharded and not self.lora_rank else 0.0
        item = self.weight_bytes
        cache = self.rows * self.sequence * 2 * s.layers * s.kv_width * item if self.sampled else 0.0
        rows = min(self.micro_batch, self.rows)
        tokens, patches = rows * self.sequence, min(rows, self.images) * self.visual_tokens * 4
        kept = tokens * s.width * item * s.layers  # the input of every layer; the rest is recomputed
        if self.vision_trained:
            kept += patches * s.vision_width * item * s.vision_layers
            kept += min(rows, self.images) * self.visual_tokens * s.tower_kept * item
        # The recomputed activations of one layer, and their gradients.
        layer = 2 * tokens * (3 * s.inner + 6 * s.width) * item
        tower = 2 * patches * (3 * s.vision_inner + 6 * s.vision_width) * item if self.vision_trained else 0.0
        backward = kept + max(layer, tower)
        return {
            "weights, gradients, optimiser": held,
            "start model": reference,
            "while sampling: gathered weights and key-value cache": gathered + cache,
            "in the backward pass: activations": backward,
            "peak": held + reference + max(gathered + cache, backward),
        }

    def seconds(self) -> dict[str, float]:
        """Seconds of a step, by part."""
        s, speed = self.shape, self.machine.flops * REACHED
        picture = 2 * (s.tower_products or 4 * s.vision) * self.visual_tokens * self.images
        dense = s.language - s.vocabulary * 2  # the embedding is looked up, the head counts below
        passed = 2 * self.rows * self.sequence * (dense + s.vocabulary)
        prefill = 2 * self.rows * (self.visual_tokens + _PROMPT_TEXT) * dense + picture
        forward = passed + picture * (1 if not self.sampled else max(1.0, self.rows / self.micro_batch / 2))
        reading = 4.0 * s.language if self.four_bit else 0.0  # 4-bit weights are written out and read in 16 bits
        token = (self.weights() + reading) / (self.machine.bandwidth * BANDWIDTH_SHARE)
        token += VLLM_TOKEN_OVERHEAD if self.vllm else TOKEN_OVERHEAD
        token += 3 * KERNEL * 7 * s.layers if self.lora_rank and not self.vllm else 0.0
        unpack = reading / (self.machine.bandwidth * BANDWIDTH_SHARE) * -(-self.rows // self.micro_batch)
        # Forward, recomputed forward, gradient of the inputs, and of the weights unless they are frozen.
        passes = 3 if self.lora_rank else 4
        # The readout takes a step with several micro batches through twice: its loss is of all pictures together.
        passes += not self.sampled and self.micro_batch < self.images
        parts = {
            "pictures and prompts, to sample": prefill / speed if self.sampled else 0.0,
            "sampling": self.reply_tokens * token if self.sampled else 0.0,
            "start model": forward / speed + unpack,
            "forward and backward": passes * (forward / speed + unpack),
        }
        return {**parts, "a step": sum(parts.values())}


def dry_run(config: RankerConfig, processes: int = 1) -> list[str]:
    """Settings, data, steps, memory and time of a run, for the user; nothing is loaded and nothing written."""
    from vqr1_metric.train_ranker.data import prepare_data, summary
    from vqr1_metric.train_ranker.run import arguments_of

    training, validation = prepare_data(config, processes)
    arguments_of(config, validation)
    default = RankerConfig()
    lines = ["settings that differ from the defaults:"]
    lines += [
        f"  {f.name}: {value!r}"
        for f in fields(config)
        if (value := getattr(config, f.name)) != getattr(default, f.name)
    ]
    lines += ["data:", *(f"  {line}" for line in summary(training, validation))]
    per_epoch, steps = count_steps(config, training, processes)
    lines.append(f"steps: {steps} ({per_epoch} in an epoch), {config.images_per_device * processes} pictures each")
    return [*lines, *_cost(config, training, processes, steps)]


def count_steps(config: RankerConfig, training: Sequence[RatingSet], processes: int = 1) -> tuple[int, int]:
    """Steps of an epoch and of the run."""
    from vqr1_metric.train_ranker.base import TrainingRows
    from vqr1_metric.train_ranker.sampler import ComparisonSampler

    size = config.comparison_size(processes)
    per_step = config.images_per_device * processes // size
    sampler = ComparisonSampler(TrainingRows.of(training).units, size, per_step, mixing=config.mixing, seed=config.seed)
    accumulated = int(config.trainer.get("gradient_accumulation_steps", 1)) if config.objective != "sampled" else 1
    per_epoch = max(1, sampler.sets_per_epoch // per_step // accumulated) * config.num_iterations
    return per_epoch, config.max_steps if config.max_steps > 0 else round(per_epoch * config.epochs)


def _cost(config: RankerConfig, training: Sequence[RatingSet], processes: int, steps: int) -> list[str]:
    from transformers import AutoConfig

    from vqr1_metric.backends.loading import ModelSpec
    from vqr1_metric.images import load_image

    spec = ModelSpec(config.model, config.revision)
    try:
        shape = Shape.of(AutoConfig.from_pretrained(str(spec.folder or spec.model), revision=spec.revision))
    except (OSError, ValueError) as error:
        return [f"memory and time: not known, the model's shape cannot be read ({' '.join(str(error).split())[:120]})"]
    pixels = pixel_config_of(spec.folder).with_limits(config.min_pixels, config.max_pixels)
    some = [image for s in training for image in s.images][:16]
    sizes = [load_image(image.read(), image.name).shape[-2:] for image in some]
    tokens = sum(pixels.visual_tokens(*size) for size in sizes) / len(sizes)
    machine = this_machine()
    plan = Plan(
        machine,
        processes,
        shape,
        tokens,
        sampled=config.objective == "sampled",
        images=config.images_per_device,
        replies=config.num_generations,
        micro_batch=config.micro_batch,
        reply_tokens=config.max_new_tokens,
        lora_rank=config.lora_rank,
        four_bit=config.quantization == "4bit",
        sharded="deepspeed" in config.trainer or "fsdp" in config.trainer,
        weight_bytes=4.0 if machine.memory == 0 else 2.0,
        vision_trained=not config.freeze_vision,
        vllm=config.use_vllm,
    )
    peak, step = plan.memory()["peak"], plan.seconds()["a step"]
    over = f", of which it has {machine.memory / 1e9:.0f}" if machine.memory else ""
    return [
        f"memory: about {peak / 1e9:.1f} GB on {machine.name}{over}, and a few more for fragmentation",
        f"time: about {_duration(step)} a step, {_duration(step * steps)} in all, at pictures of {tokens:.0f} visual "
        "tokens; computed from the model's shape (docs/training.md), not measured; validation comes on top",
    ]


def pixel_config_of(folder: Path | None) -> Any:
    """The pixel settings of a local model; of one on the Hub, those of Qwen2.5-VL."""
    from vqr1_metric.backends.pixels import PixelConfig

    for name in ("preprocessor_config.json", "processor_config.json"):
        if folder is not None and (folder / name).is_file():
            return PixelConfig.from_file(folder / name)
    return PixelConfig(14, 2, 2, 56 * 56, 12_845_056, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def this_machine() -> Machine:
    """The device of this process: known GPUs by name, a CPU by the time of a matrix product."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = next((m for key, m in MACHINES.items() if key in found.name), MACHINES["A100"])
        return Machine(found.name, known.flops, known.bandwidth, float(found.total_memory))
    a = torch.randn(512, 512)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return Machine("this CPU", 2 * 512**3 / min(times), 10e9)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def table(plans: Sequence[tuple[str, Plan]]) -> str:
    """Memory and time of several plans, in Markdown."""
    lines: list[str] = []
    for unit, scale, of in (("GB", 1e9, Plan.memory), ("s", 1.0, Plan.seconds)):
        names = list(of(plans[0][1]))
        lines += ["", "| plan | device | " + " | ".join(f"{name} ({unit})" for name in names) + " |"]
        lines.append("|---|---|" + "---|" * len(names))
        for name, plan in plans:
            cells = " | ".join(f"{value / scale:.1f}" for value in of(plan).values())
            lines.append(f"| {name} | {plan.machine.name} | {cells} |")
    return "\n".join(lines[1:])
