"""Memory and time of a training step at 7B, memory of scoring, on paper (nothing is run), beside what is known.

    python -m benchmarks.training.plan_7b
    python -m benchmarks.training.plan_7b --measure     # one real step of a 3B-shaped model of 2 layers on this CPU

Formulas are those of ``vqr1_metric.train_ranker.plan``, which `vqr1 train --dry-run` uses too; sizes are counted on the
meta device. What is assumed, not derived, is printed with the result.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from transformers import Qwen2_5_VLConfig

from vqr1_metric.train_ranker import plan as formulas
from vqr1_metric.train_ranker.plan import MACHINES, Plan, Shape, table

ASSUMED = {
    "share of the GPU's peak reached in matrix products": formulas.REACHED,
    "share of its memory bandwidth reached in decoding": formulas.BANDWIDTH_SHARE,
    "seconds of overhead for each decoded token (transformers)": formulas.TOKEN_OVERHEAD,
    "seconds of overhead for each decoded token (vLLM)": formulas.VLLM_TOKEN_OVERHEAD,
    "seconds to start a kernel (an adapter adds three to each linear layer while it is not merged)": formulas.KERNEL,
}
#: Of Qwen2.5-VL: vocabulary, width, inner width, layers, heads, key-value heads, tied embeddings.
SIZES = {
    "7B": (152_064, 3584, 18_944, 28, 28, 4, False),
    "3B": (151_936, 2048, 11_008, 36, 16, 2, True),
}


def config_of(name: str, layers: int | None = None, vision_layers: int = 32) -> Qwen2_5_VLConfig:
    """The configuration of a released size, with fewer layers if asked for."""
    vocabulary, width, inner, depth, heads, kv_heads, tied = SIZES[name]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers or depth,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": width,
        },
        tie_word_embeddings=tied,
    )


def scoring_memory(shape: Shape, width: int, height: int, bits: int = 16, pictures: int = 1) -> dict[str, float]:
    """GB of the one-pass readout of some pictures in one batch, with weights of 16 or 4 bits; 54 answer nodes."""
    weights = Plan(MACHINES["A100"], 1, shape, 1, four_bit=bits == 4).weights()
    patches = pictures * (width // 28) * (height // 28) * 4
    tokens = patches // 4 + pictures * (110 + 54)
    pixels = patches * 1176 * 4 * 2  # float32, the list of pictures and the batch
    tower = patches * (8 * shape.vision_width + 3 * shape.vision_inner) * 2
    language = tokens * (8 * shape.width + 3 * shape.inner) * 2
    # Attention with the tree's mask: at worst scores of one layer and all 28 heads in full, in 16 bits.
    scores = 28 * pictures * (tokens // pictures) ** 2 * 2
    head = 16_384 * shape.width * 4 + pictures * 55 * 16_384 * 4  # a chunk of the vocabulary in float32
    moment = max(pixels + tower, language + scores, head)
    return {"weights": weights / 1e9, "activations": moment / 1e9, "peak": (weights + moment) / 1e9}


def plans(shape: Shape, small: Shape) -> list[tuple[str, Plan]]:
    """What one would run."""
    a100, h100, h200, rtx = (MACHINES[name] for name in ("A100", "H100", "H200", "4090"))
    lora = {"micro_batch": 6, "lora_rank": 64, "sharded": False}
    quantised = {"micro_batch": 2, "lora_rank": 32, "sharded": False, "four_bit": True, "vision_trained": False}
    student = {"sampled": False, "images": 16, "micro_batch": 4, "sharded": False}
    return [
        ("`paper`: 16 GPUs, all weights (ZeRO-3), 512x384", Plan(a100, 16, shape, 252)),
        ("`paper`, 1024x768", Plan(a100, 16, shape, 999)),
        ("`paper`, 1024x768", Plan(h100, 16, shape, 999)),
        ("`paper` with vLLM, 1024x768", Plan(h100, 16, shape, 999, vllm=True)),
        ("`80gb-lora`, 512x384", Plan(h100, 1, shape, 252, **lora)),
        ("`80gb-lora`, 1024x768", Plan(h100, 1, shape, 999, **lora)),
        ("`80gb-lora` with vLLM, 1024x768", Plan(h200, 1, shape, 999, vllm=True, **lora)),
        ("`24gb-4bit`, 512x384", Plan(rtx, 1, shape, 252, **quantised)),
        ("`24gb-4bit`, its limit of 512 visual tokens", Plan(rtx, 1, shape, 512, **quantised)),
        ("`exact`, LoRA 64, 16 pictures of 512x384", Plan(h100, 1, shape, 252, **{**student, "lora_rank": 64})),
        ("distil into 3B, all weights, 16 pictures of 512x384", Plan(h100, 1, small, 252, **student)),
    ]


def measure(visual_tokens: int = 252, rows: int = 2) -> None:
    """One forward and backward pass of a 3B-shaped model of 2 + 2 layers in bfloat16 on this CPU, beside the plan."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = config_of("3B", layers=2, vision_layers=2)
    shape = Shape.of(config)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    height = 14 * 2
    width = visual_tokens * 4 // height
    grid = torch.tensor([[1, height, width]] * rows)
    ids = torch.full((rows, visual_tokens + 164), 100)
    ids[:, 20 : 20 + visual_tokens] = config.image_token_id
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(rows * height * width, 1176, dtype=torch.bfloat16),
        "image_grid_thw": grid,
    }
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seconds = []
    for _ in range(2):
        began = time.process_time()  # other programs may use the machine
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        (hidden.float() ** 2).mean().backward()
        seconds.append(time.process_time() - began)
        model.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    a @ a
    began = time.process_time()
    a @ a
    flops = 2 * 2048**3 / (time.process_time() - began)
    machine = formulas.Machine("this CPU", flops, 10e9)
    plan = Plan(machine, 1, shape, visual_tokens, sampled=False, images=rows, micro_batch=rows, sharded=False)
    gradients = sum(weight.numel() for weight in model.parameters()) * 2
    planned = plan.memory()["in the backward pass: activations"] + gradients
    passes = plan.seconds()["forward and backward"] * formulas.REACHED
    print(f"model of 2 + 2 layers: {(shape.language + shape.vision) / 1e6:.0f} million parameters, {rows} pictures")
    print(f"matrix products reach {flops / 1e9:.0f} GFLOP/s; forward and backward at that rate: {passes:.1f} s planned")
    print(f"measured: {seconds[1]:.1f} CPU seconds, a share of {passes / seconds[1]:.2f} of the products' rate")
    print(f"memory beside the weights: {planned / 1e9:.2f} GB planned, {(peak - start_memory) / 1e9:.2f} GB measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run a step of a small model of full width")
    if parser.parse_args().measure:
        measure()
        return
    shape, small = Shape.of(config_of("7B")), Shape.of(config_of("3B"))
    print(f"7B: {shape.language / 1e9:.2f} + {shape.vision / 1e9:.2f} billion parameters, counted on the meta device\n")
    print("| scoring, one pass, 1024x768 | weights (GB) | activations (GB) | peak (GB) |\n|---|---|---|---|")
    for bits, pictures in ((16, 1), (16, 10), (4, 1), (4, 4)):
        parts = scoring_memory(shape, 1024, 768, bits, pictures)
        print(f"| {bits} bits, {pictures} at once | " + " | ".join(f"{value:.1f}" for value in parts.values()) + " |")
    print(
        "\nComputed, not measured. Assumed: " + "; ".join(f"{what}: {value}" for what, value in ASSUMED.items()) + ".\n"
    )
    print(table(plans(shape, small)))


if __name__ == "__main__":
    main()
