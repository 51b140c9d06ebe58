"""Memory and time of an RL2R step at 7B, computed on paper (nothing is run): python benchmarks/plan_7b.py

Sizes are those of Qwen2.5-VL-7B. What is assumed, not derived, is listed in ASSUMED and printed with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        cache = self.images * self.replies * sequence * 2 * LAYERS * KV_WIDTH * 2
        tokens, patches = self.micro_batch * sequence, self.micro_batch * self.visual_tokens * 4
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

    def adapter(self) -> float:
        """Parameters of the LoRA matrices on every linear layer."""
        language = 2 * (2 * WIDTH) + 2 * (WIDTH + KV_WIDTH) + 3 * (WIDTH + INNER)
        vision = 4 * VISION_WIDTH + 2 * VISION_WIDTH + 3 * (VISION_WIDTH + VISION_INNER)
        return self.lora_rank * (LAYERS * language + VISION_LAYERS * vision * self.vision_trained)

    def seconds(self) -> dict[str, float]:
        """Seconds of a step, by part."""
        speed = self.gpu.flops * REACHED
        count = self.images * self.replies
        forward = 2 * count * (LANGUAGE * (self.visual_tokens + PROMPT_TEXT + REPLY) + VISION * self.visual_tokens * 4)
        prefill = 2 * count * (LANGUAGE * (self.visual_tokens + PROMPT_TEXT) + VISION * self.visual_tokens * 4)
        token = self.weight_bytes * LANGUAGE / (self.gpu.bandwidth * BANDWIDTH_SHARE)
        token += VLLM_OVERHEAD if self.vllm else HF_OVERHEAD
        # Forward, recomputed forward, gradient of the inputs, and of the weights unless they are frozen.
        passes = 3 if self.lora_rank else 4
        parts = {
            "pictures through the model to sample": prefill / speed,
            "sampling 256 tokens": REPLY * token,
            "log-probabilities of the start model": forward / speed,
            "forward and backward": passes * forward / speed,
        }
        return {**parts, "a step": sum(parts.values())}


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
