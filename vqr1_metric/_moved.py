"""Names of 0.1.0 that moved: importing one says where it is now."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Module of 0.1.0 -> where its names are now.
MODULES = {
    "vqr1_metric.distortions": "vqr1_metric.images.distortions",
    "vqr1_metric.reading": "vqr1_metric.images.ahead",
    "vqr1_metric.prompts": "vqr1_metric.protocol",
    "vqr1_metric.records": "vqr1_metric.score_files",
    "vqr1_metric.functional.bootstrap": "vqr1_metric.functional.intervals",
    "vqr1_metric.functional.parsing": "vqr1_metric.protocol",
    "vqr1_metric.functional.fidelity": "vqr1_metric.functional.reward",
    "vqr1_metric.backends.processor": "vqr1_metric.backends.cpu",
    "vqr1_metric.backends.vision": "vqr1_metric.backends.windows",
    "vqr1_metric.backends.chat_client": "vqr1_metric.backends.http.client",
    "vqr1_metric.backends.answer_walk": "vqr1_metric.backends.http.walk",
    "vqr1_metric.cli.evaluate_special": "vqr1_metric.evaluation.calls",
    "vqr1_metric.cli.scorers": "vqr1_metric.evaluation.columns",
    "vqr1_metric.evaluation.labels": "vqr1_metric.ratings",
    "vqr1_metric.evaluation.readers": "vqr1_metric.ratings",
    "vqr1_metric.evaluation.datasets": "vqr1_metric.ratings.datasets",
    "vqr1_metric.cli.inputs": "vqr1_metric.images.find",
    "vqr1_metric.nano.training": "recipes.nano, in a clone of the repository",
    "vqr1_metric.train_ranker.naming": "recipes.nano.naming, in a clone of the repository",
    "vqr1_metric.train_ranker.reasoning": "recipes.nano, in a clone of the repository",
    "vqr1_metric.train_ranker.ratings": "vqr1_metric.ratings, and vqr1_metric.train_ranker.data for the checks",
}


class MovedModules:
    """The last of ``sys.meta_path``: asked only for modules that nothing else found."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Raise for a module that moved; None for any other."""
        if name in MODULES:
            # Without name=, which would make `from package import module` swallow the message.
            raise ModuleNotFoundError(f"{name} of version 0.1.0 is now {MODULES[name]}.")
        return None
