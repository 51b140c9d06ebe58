"""Memory of scoring, memory and time of an RL2R step at 7B, on paper (nothing is run).

    python -m benchmarks.training.plan_7b

Sizes are those of Qwen2.5-VL-7B. What is assumed, not derived, is listed in ASSUMED and printed with the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

LANGUAGE, VISION = 7.62e9, 0.67e9  # parameters
LAYERS, WIDTH, INNER, KV_WIDTH = 28, 3584, 18944, 4 * 128
VISION_LAYERS, VISION_WIDTH, VISION_INNER = 32, 1280, 3420
PROMPT_TEXT, REPLY = 110, 256  # tokens
ASSUMED = {
    "share of the GPU's peak reached in matrix products": 0.4,
    "share of its memory bandwidth reached in decoding": 0.6,
    "seconds of overhead for each decoded token (transformers)": 0.025,
    "seconds of overhead for each decoded token (vLLM)": 0.005,
}
REACHED, BANDWIDTH_SHARE, HF_OVERHEAD, VLLM_OVERHEAD = ASSUMED.values()


@dataclass
class Gpu:
    name: str
    flops: float
    bandwidth: float


A100, H100, H200 = Gpu("A100 80 GB", 312e12, 2.0e12), Gpu("H100 80 GB", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12)


@dataclass
class Plan:
    """Images of a step on each GPU, replies each, replies in one backward pass, and how the weights are held."""

    name: str
    gpu: Gpu
    gpus: int
    visual_tokens: int
    images: int = 8
    replies: int = 6
    micro_batch: int = 48
    lora_rank: int = 0
    weight_bytes: float = 2.0
    vision_trained: bool = True
    vllm: bool = False

    def memory(self) -> dict[str, float]:
        """GB on one GPU, at the two peaks."""
        parameters = LANGUAGE + VISION
        sequence = self.visual_tokens + PROMPT_TEXT + REPLY
        if self.lora_rank:
            held = parameters * self.weight_bytes + self.adapter() * 16
            reference = gathered = 0.0
        else:  # ZeRO-3: bf16 weight and gradient, float32 master weight and two moments, divided
            held = parameters * 16 / self.gpus
            reference = parameters * 2 / self.gpus
            gathered = parameters * 2
        if self.vllm:
            held += parameters * 2  # its own copy of the weights
        cache = self.rows * sequence * 2 * LAYERS * KV_WIDTH * 2
        tokens = self.micro_batch * sequence
        patches = self.pictures(self.micro_batch, shuffled=True) * self.micro_batch / self.rows * self.visual_tokens * 4
        kept = tokens * WIDTH * 2 * LAYERS  # the input of every layer; the rest is recomputed
        kept += patches * VISION_WIDTH * 2 * VISION_LAYERS if self.vision_trained else 0
        one_layer = tokens * (3 * INNER + 6 * WIDTH) * 2
        return {
            "weights, gradients, optimiser": held / 1e9,
            "reference": reference / 1e9,
            "while sampling: gathered weights and key-value cache": (gathered + cache) / 1e9,
            "in the backward pass: activations": (kept + one_layer) / 1e9,
            "peak": (held + reference + max(gathered + cache, kept + one_layer)) / 1e9,
        }

    @property
    def rows(self) -> int:
        """Replies of a step."""
        return self.images * self.replies

    def pictures(self, rows: int, shuffled: bool) -> float:
        """Pictures that the vision tower sees when all replies go through the model, so many rows at a time.

        Equal pictures of one forward pass are seen once; TRL shuffles the replies before the backward pass.
        """
        if shuffled:
            absent = comb(self.rows - self.replies, rows) / comb(self.rows, rows)
            return self.rows / rows * self.images * (1 - absent)
        return self.rows / rows * max(1.0, rows / self.replies)

    def adapter(self) -> float:
        """Parameters of the LoRA matrices on every linear layer."""
        language = 2 * (2 * WIDTH) + 2 * (WIDTH + KV_WIDTH) + 3 * (WIDTH + INNER)
        vision = 4 * VISION_WIDTH + 2 * VISION_WIDTH + 3 * (VISION_WIDTH + VISION_INNER)
        return self.lora_rank * (LAYERS * language + VISION_LAYERS * vision * self.vision_trained)

    def seconds(self) -> dict[str, float]:
        """Seconds of a step, by part."""
        speed = self.gpu.flops * REACHED
        picture = 2 * VISION * self.visual_tokens * 4
        prompt = 2 * self.rows * LANGUAGE * (self.visual_tokens + PROMPT_TEXT)
        reply = 2 * self.rows * LANGUAGE * REPLY
        prefill = prompt + picture * self.pictures(self.rows, shuffled=False)
        reference = prompt + reply + picture * self.pictures(self.micro_batch, shuffled=False)
        forward = prompt + reply + picture * self.pictures(self.micro_batch, shuffled=True)
        token = self.weight_bytes * LANGUAGE / (self.gpu.bandwidth * BANDWIDTH_SHARE)
        token += VLLM_OVERHEAD if self.vllm else HF_OVERHEAD
        # Forward, recomputed forward, gradient of the inputs, and of the weights unless they are frozen.
        passes = 3 if self.lora_rank else 4
        parts = {
            "pictures through the model to sample": prefill / speed,
            "sampling 256 tokens": REPLY * token,
            "log-probabilities of the start model": reference / speed,
            "forward and backward": passes * forward / speed,
        }
        return {**parts, "a step": sum(parts.values())}


def scoring_memory(width: int, height: int, bits: int = 16, pictures: int = 1, nodes: int = 54) -> dict[str, float]:
    """GB of the one-pass readout of some pictures in one batch, with weights of 16 or 4 bits.

    In 4 bits (bitsandbytes NF4 with double quantisation, 4.13 bits a weight) the embedding and the head stay in 16.
    """
    vocabulary = 152_064 * WIDTH
    quantised = LANGUAGE + VISION - 2 * vocabulary
    weights = (LANGUAGE + VISION) * 2 if bits == 16 else quantised * 4.13 / 8 + 2 * vocabulary * 2
    patches = pictures * (width // 28) * (height // 28) * 4
    tokens = pictures * (patches // 4 // pictures + PROMPT_TEXT + nodes)
    pixels = patches * 1176 * 4 * 2  # float32, the list of pictures and the batch
    tower = patches * (8 * VISION_WIDTH + 3 * VISION_INNER) * 2
    language = tokens * (8 * WIDTH + 3 * INNER) * 2
    # Attention with the tree's mask: at worst scores of one layer and all heads in full, in 16 bits.
    scores = 28 * pictures * (tokens // pictures) ** 2 * 2
    head = 16_384 * WIDTH * 4 + pictures * (nodes + 1) * 16_384 * 4  # a chunk of the vocabulary in float32
    moment = max(pixels + tower, language + scores, head)
    return {"weights": weights / 1e9, "activations": moment / 1e9, "peak": (weights + moment) / 1e9}


PLANS = [
    Plan("16 GPUs, all weights (ZeRO-3), 512x384", A100, 16, 252),
    Plan("16 GPUs, all weights (ZeRO-3), 1024x768", A100, 16, 999),
    Plan("16 GPUs, all weights (ZeRO-3), 1024x768", H100, 16, 999),
    Plan("16 GPUs, the same with vLLM", H100, 16, 999, vllm=True),
    Plan("1 GPU, LoRA 64, 512x384", H100, 1, 252, micro_batch=6, lora_rank=64),
    Plan("1 GPU, LoRA 64, 1024x768", H100, 1, 999, micro_batch=6, lora_rank=64),
    Plan("1 GPU, LoRA 64, 1024x768, vLLM", H200, 1, 999, micro_batch=6, lora_rank=64, vllm=True),
]


def main() -> None:
    print("| scoring, one pass, 1024x768 | weights (GB) | activations (GB) | peak (GB) |\n|---|---|---|---|")
    for bits, pictures in ((16, 1), (16, 10), (4, 1), (4, 4)):
        parts = scoring_memory(1024, 768, bits, pictures)
        print(f"| {bits} bits, {pictures} at once | " + " | ".join(f"{value:.1f}" for value in parts.values()) + " |")
    print()
    memory, seconds = list(PLANS[0].memory()), list(PLANS[0].seconds())
    print(
        "Computed, not measured. Assumed: " + "; ".join(f"{what}: {value}" for what, value in ASSUMED.items()) + ".\n"
    )
    print("| plan | GPU | " + " | ".join(f"{name} (GB)" for name in memory) + " |")
    print("|---|---|" + "---|" * len(memory))
    for plan in PLANS:
        print(f"| {plan.name} | {plan.gpu.name} | " + " | ".join(f"{v:.1f}" for v in plan.memory().values()) + " |")
    print("\n| plan | GPU | " + " | ".join(f"{name} (s)" for name in seconds) + " |")
    print("|---|---|" + "---|" * len(seconds))
    for plan in PLANS:
        print(f"| {plan.name} | {plan.gpu.name} | " + " | ".join(f"{v:.1f}" for v in plan.seconds().values()) + " |")


if __name__ == "__main__":
    main()
