"""Eight pictures in one pass, in micro batches and in accumulated steps give one gradient, for every objective."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from vqr1_metric.protocol import write_reply
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.run import build_trainer, prepare_data

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Gradients(TrainerCallback):
    """Keeps what reaches the optimiser in the first step."""

    found: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def gradient(settings: dict, folder: Path, **more) -> dict[str, torch.Tensor]:
    common = {"max_steps": 1, "max_grad_norm": 0.0, "output_dir": str(folder), "log_replies": False}
    config = RankerConfig(**{**settings, **common, **more})
    trainer = build_trainer(config, *prepare_data(config))
    if config.objective == "sampled":
        trainer._generate_single_turn = replies_for(trainer)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept.found


def replies_for(trainer):
    """Replies that depend on the picture and their place among its replies alone, in place of sampled ones."""

    def generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        tokenizer, k = trainer.processing_class.tokenizer, trainer.num_generations
        scores = [1 + (int(image[0]) * 37 + i % k * 111) % 400 / 100 for i, image in enumerate(images)]
        ends = [tokenizer.eos_token_id]
        return [tokenizer.encode(write_reply(score), add_special_tokens=False) + ends for score in scores], None

    return generate


@pytest.mark.parametrize("objective", ["sampled", "exact", "fidelity", "distill"])
def test_one_gradient(
    objective: str, settings: dict, warm_model: Path, rated: Path, tmp_path: Path, trl_trainer
) -> None:
    replies = 3 if objective == "sampled" else 1
    common = {"model": str(warm_model), "objective": objective, "images_per_comparison": 4, "num_generations": 3}
    if objective == "distill":
        lines = [{"path": str(rated / f"{i}.png"), "score": 1.5 + i / 8, "std": 0.4} for i in range(24)]
        (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        common |= {"teacher": [str(tmp_path / "scores.jsonl")], "data": settings["data"][:1]}
    whole = gradient(settings, tmp_path, **common, images_per_device=8, micro_batch=8 * replies)
    parts = gradient(settings, tmp_path, **common, images_per_device=8, micro_batch=2 * replies)
    steps = gradient(
        settings,
        tmp_path,
        **common,
        images_per_device=4,
        micro_batch=4 * replies,
        trainer={"gradient_accumulation_steps": 2},
    )
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 1e-4 and whole.keys() == parts.keys() == steps.keys()
    for name, expected in whole.items():
        for found in (parts[name], steps[name]):
            torch.testing.assert_close(found, expected, atol=2e-3 * scale, rtol=1e-3)
