"""RL2R on TRL with a tiny real model: what a step sees, the official gradient, exact resuming, a model that loads."""

import json
import math
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl", minversion="1.16", reason="RL with sampled replies needs trl 1.16")
    try:
        from vqr1_metric.train_ranker.trainer import RankerTrainer
    except ImportError as error:  # trl and transformers of versions that do not go together
        pytest.skip(f"trl cannot be imported here: {error}", allow_module_level=True)

from transformers import TrainerCallback

from vqr1_metric import QualityScorer, VisualQualityR1Score
from vqr1_metric.backends.base import ModelError
from vqr1_metric.train_ranker.config import PRESETS, ConfigError, RankerConfig
from vqr1_metric.train_ranker.run import prepare_data, train
from vqr1_metric.train_ranker.trainer import grpo_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
PARITY = Path(__file__).parents[1] / "parity"


class Killed(Exception):
    """Stands for a run that dies."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def config_of(settings: dict, model: Path, output: Path, **more) -> RankerConfig:
    return RankerConfig(**{**settings, "model": str(model), "output_dir": str(output), **more})


@pytest.fixture(scope="module")
def trained(settings: dict, warm_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of four steps over more than one epoch, with a validation."""
    output = tmp_path_factory.mktemp("run") / "out"
    config = config_of(settings, warm_model, output, validation_fraction=0.34, max_steps=3, eval_steps=2)
    train(config)
    return config, output


def test_the_result_loads_in_the_metric(trained, warm_model: Path, rated: Path) -> None:
    _, output = trained
    before, after = load_file(warm_model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)
    (score,) = QualityScorer(str(output), max_pixels=56 * 56).score([rated / "3.png"])
    metric = VisualQualityR1Score(model=str(output), max_pixels=56 * 56)
    metric.update([str(rated / "3.png")])
    assert 1 <= score.score <= 5 and float(metric.compute()) == pytest.approx(score.score, abs=1e-4)


def test_what_is_logged_and_written(trained) -> None:
    _, output = trained
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "reward" in entry]
    wanted = {"fidelity", "spread", "score_std", "zero_spread", "readable", "kl", "completions/mean_length"}
    assert len(steps) == 3 and wanted <= steps[0].keys() and steps[0]["readable"] > 0.5
    validated = [entry for entry in log if "eval_readable" in entry]
    assert [entry["step"] for entry in validated] == [2, 3]
    assert {"eval_srcc_noise", "eval_plcc_noise", "eval_srcc_blur", "eval_srcc", "eval_spread"} <= validated[0].keys()
    replies = [json.loads(line) for line in (output / "replies.jsonl").read_text().splitlines()]
    assert len(replies) == 3 * 4 * 3 and replies[0]["picture"].endswith(".png") and "<answer>" in replies[0]["reply"]
    card = (output / "README.md").read_text()
    assert "| noise | 8 | 4 |" in card and "srcc noise" in card and "\n| 0 |" in card and "VisualQualityR1Score" in card
    assert str(output.parent) not in card  # nothing of this machine


def test_sampling_ignores_the_checkpoints_own_settings(trained, warm_model: Path) -> None:
    """The warm model's generation_config is nearly greedy; replies sampled with it would all be alike."""
    assert json.loads((warm_model / "generation_config.json").read_text())["temperature"] < 0.01
    _, output = trained
    replies = [json.loads(line) for line in (output / "replies.jsonl").read_text().splitlines()][:12]
    by_picture = [{row["reply"] for row in replies[i : i + 3]} for i in range(0, 12, 3)]
    assert max(map(len, by_picture)) > 1


def test_a_run_in_the_way_and_a_run_that_changed(trained, settings: dict, warm_model: Path, tmp_path: Path) -> None:
    config, _ = trained
    with pytest.raises(ConfigError, match="Expected an output folder without a run in it"):
        train(config)
    with pytest.raises(ConfigError, match=r"but learning_rate is 0.5 and was 0.0003"):
        train(RankerConfig(**{**vars(config), "learning_rate": 0.5}), resume=True)
    with pytest.raises(ConfigError, match="Expected a run to resume"):
        train(config_of(settings, warm_model, tmp_path / "none"), resume=True)


def test_the_sum_of_both_rewards_becomes_the_published_advantage(settings, warm_model: Path, tmp_path: Path) -> None:
    golden = runpy.run_path(str(PARITY / "make_rl2r.py"))
    config = config_of(settings, warm_model, tmp_path, max_steps=1, temperature=0.4)  # few unreadable replies
    trainer = RankerTrainer(None, config, *prepare_data(config))
    trainer.train()
    logs, k = trainer._logs, config.num_generations
    scores = torch.tensor(list(logs["extra"]["score"])).view(-1, k)
    assert bool(scores.isfinite().all())
    rows = {row["image"]: row["quality"] for row in trainer.training.rows}
    images = [prompt[0]["content"][0]["image"] for prompt in logs["prompt"]][::k]
    mos = [rows[image] for image in images]
    forms, found = list(logs["rewards"]["format"]), list(logs["advantages"])
    for i in range(len(mos)):
        earned = [golden["reward"](scores.tolist(), mos, i, j) for j in range(k)]
        assert list(logs["rewards"]["ranking"])[i * k : i * k + k] == pytest.approx(earned, abs=1e-6)
        both = [r + f for r, f in zip(earned, forms[i * k : i * k + k], strict=True)]
        std = math.sqrt(golden["variance"](both)) + 1e-4
        assert found[i * k : i * k + k] == pytest.approx([(b - golden["mean"](both)) / std for b in both], abs=2e-4)


def test_loss_and_gradient_are_the_published_ones(settings, warm_model: Path, tmp_path: Path) -> None:
    """TRL's loss with our settings, on the golden log-probabilities."""
    config = config_of(settings, warm_model, tmp_path)
    trainer = RankerTrainer(None, config, *prepare_data(config))
    trainer.current_gradient_accumulation_steps = 1
    for case in json.loads((PARITY / "rl2r.json").read_text())["cases"]:
        new = [torch.tensor(one) for row in case["new"] for one in row]
        reference = [torch.tensor(one) for row in case["reference"] for one in row]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in new], batch_first=True)
        leaf = torch.nn.utils.rnn.pad_sequence(new, batch_first=True).requires_grad_()
        entropy = torch.zeros_like(leaf)
        trainer._get_per_token_logps_and_entropies = lambda *_, leaf=leaf, entropy=entropy, **__: (leaf, entropy, None)
        inputs = {
            "prompt_ids": torch.zeros(len(new), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(new), 1),
            "completion_ids": torch.zeros_like(mask, dtype=torch.long),
            "completion_mask": mask,
            "advantages": torch.tensor(case["advantages"]).flatten(),
            "ref_per_token_logps": torch.nn.utils.rnn.pad_sequence(reference, batch_first=True),
        }
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        assert float(loss) == pytest.approx(case["loss"], abs=1e-6)
        expected = torch.nn.utils.rnn.pad_sequence([torch.tensor(g) for g in case["gradient"]], batch_first=True)
        torch.testing.assert_close(leaf.grad, expected, atol=2e-7, rtol=0)


def test_the_paper_preset_states_every_official_setting() -> None:
    args = grpo_config(RankerConfig.preset("paper", output_dir="out"))
    assert (args.loss_type, args.scale_rewards, args.importance_sampling_level) == ("grpo", "group", "token")
    assert (args.beta, args.epsilon, args.use_bias_correction_kl) == (0.04, 0.2, False)
    assert (args.num_generations, args.per_device_train_batch_size, args.steps_per_generation) == (6, 48, 1)
    assert (args.learning_rate, args.max_completion_length, args.temperature, args.top_k) == (1e-6, 256, 1.0, 50)
    assert (args.num_train_epochs, args.lr_scheduler_type, args.num_iterations) == (10, "linear", 1)
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps, args.reward_weights) == (0.0, 1.0, 0, [1.0, 1.0])
    stated = set(PRESETS["paper"])
    assert {
        "kl_weight",
        "clip",
        "loss",
        "gamma",
        "eps",
        "rule",
        "variance",
        "temperature",
        "comparison_scope",
    } <= stated


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_a_killed_run_resumes_bit_by_bit(lora_rank: int, settings, warm_model: Path, tmp_path: Path) -> None:
    """Killed within the second epoch (an epoch is two steps), one step after the last checkpoint."""
    more = {"lora_rank": lora_rank, "save_steps": 3, "max_steps": 5, "images_per_device": 8, "images_per_comparison": 4}
    whole = config_of(settings, warm_model, tmp_path / "whole", **more)
    train(whole)
    broken = config_of(settings, warm_model, tmp_path / "broken", **more)
    with pytest.raises(Killed):
        train(broken, callbacks=[KillAt(4)])
    assert not (tmp_path / "broken/config.json").exists()
    train(broken, resume=True)
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "broken"))
    started = load_file(warm_model / "model.safetensors")
    assert expected.keys() == found.keys() == started.keys()
    assert any(not torch.equal(expected[name], started[name]) for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    log = [
        json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"] for run in ("whole", "broken")
    ]
    assert [e["reward"] for e in log[0] if "reward" in e] == [e["reward"] for e in log[1] if "reward" in e]


def test_a_checkpoint_with_a_tensor_missing_is_refused(settings, warm_model: Path, tmp_path: Path) -> None:
    config = config_of(settings, warm_model, tmp_path / "out")
    trainer = RankerTrainer(None, config, *prepare_data(config))
    trainer.save_model(str(tmp_path / "saved"))
    file = tmp_path / "saved/model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    changed = trainer.model.state_dict()
    fresh = RankerTrainer(None, config, *prepare_data(config)).model.state_dict()
    assert all(torch.equal(changed[name], fresh[name] + 1) for name in fresh)  # every tensor, not a few
    tensors.pop(next(name for name in tensors if "norm" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing or left over"):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))


def test_pictures_are_prepared_once_a_step(settings, warm_model: Path, tmp_path: Path) -> None:
    config = config_of(settings, warm_model, tmp_path, max_steps=2)
    trainer = RankerTrainer(None, config, *prepare_data(config))
    trainer.train()
    assert trainer.processing_class.decoded <= 2 * config.images_per_device
