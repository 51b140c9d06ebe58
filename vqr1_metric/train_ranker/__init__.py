"""Train a ranker from rated pictures: RL2R (reinforcement learning to rank, arXiv 2505.14460). See docs/training.md.

Reading order: `config` and `checks` (settings), `data` and `scenes` (what is trained on), `sampler`, `reward`,
`processor` and `sharing` (what a step sees), `base`, `trainer` and `exact` (the two trainers), `distill`,
`trl_private`, `validation`, `callbacks`, `card`, `resume`, and `run` (all of it together). Before RL `coldstart`.
"""

from importlib import import_module

_EXPORTS = {
    "RankerConfig": "config",
    "PRESETS": "config",
    "ConfigError": "checks",
    "TrainingError": "checks",
    "RankerTrainer": "trainer",
    "ExactRankerTrainer": "exact",
    "batch_rewards": "reward",
    "train": "run",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
