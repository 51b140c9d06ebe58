"""Train a ranker from rated pictures: RL2R (reinforcement learning to rank, arXiv 2505.14460). See docs/training.md.

Reading order: `config`, `ratings` and `data` (what is trained on), `sampler`, `reward`, `processor` and `sharing` (what
a step sees), `base`, `trainer` and `exact` (the two trainers), `validation`, `callbacks`, `card`, and `run` (all of it
together). Before RL `coldstart`, or for nano `reasoning`, whose sentences and measure are in `naming`.
"""

from importlib import import_module

_EXPORTS = {
    "RankerConfig": "config",
    "PRESETS": "config",
    "RankerTrainer": "trainer",
    "ExactRankerTrainer": "exact",
    "train": "run",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
