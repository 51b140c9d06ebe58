"""The checks that torchmetrics' own tester makes of every metric, on one set of inputs, in one process or in two.

torchmetrics keeps its tester in its repository and not in its package.
`python metric_tester.py RANK WORLD FOLDER MODEL` is one process of two.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqr1_metric import VisualQualityR1Score

Reference = Callable[[Tensor], Tensor]


class Tanh(VisualQualityR1Score):
    """A subclass that overrides update alone."""

    def update(self, preds: Tensor, target: object = None) -> None:
        super().update((preds + 1) / 2)


class MetricTester:
    """``preds`` and ``target`` are ``(batches, B, ...)``; a reference gives the value of pictures ``(N, ...)``."""

    atol = 1e-4

    def close(self, found: Tensor, expected: Tensor) -> None:
        assert found.dtype == torch.float32 and found.shape == expected.shape, (found, expected)
        torch.testing.assert_close(found, expected, atol=self.atol, rtol=0)

    def run_class(
        self,
        kind: type[VisualQualityR1Score],
        args: dict[str, Any],
        preds: Tensor,
        target: Tensor,
        reference: Reference,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """What a metric must do: constants, pickle and clone, forward, compute over all processes, states, reset."""
        metric = kind(**args)
        for constant in ("is_differentiable", "higher_is_better", "full_state_update"):
            try:
                setattr(metric, constant, True)
            except RuntimeError:
                continue
            raise AssertionError(f"{constant} can be changed")
        metric = pickle.loads(pickle.dumps(metric))
        assert hash(metric) != hash(metric.clone()) and isinstance(metric.clone(), kind)
        for i in range(rank, len(preds), world):
            batch_value = metric(preds[i], target[i])
            if args.get("dist_sync_on_step"):
                self.close(batch_value, reference(torch.cat(list(preds[i - rank : i - rank + world]))))
            else:
                self.close(batch_value, reference(preds[i]))
        order = [i for r in range(world) for i in range(r, len(preds), world)]
        expected = reference(torch.cat([preds[i] for i in order]))
        self.close(metric.compute(), expected)
        self.close(pickle.loads(pickle.dumps(metric)).compute(), expected)
        assert metric.update_count == len(range(rank, len(preds), world))
        assert metric.state_dict() == {}
        again = kind(**args)
        metric.persistent(True)
        again.load_state_dict(metric.state_dict())
        again.update(preds[0], target=target[0])
        own = [preds[i] for i in range(rank, len(preds), world)]
        if world == 1:
            self.close(again.compute(), reference(torch.cat([*own, preds[0]])))
        metric.reset()
        metric.update(preds[0], target[0])
        if world == 1:
            self.close(metric.compute(), reference(preds[0]))

    def run_functional(self, function: Callable[..., Tensor], preds: Tensor, reference: Reference) -> None:
        """Batch by batch; a list of pictures, whatever their dtype, is their batch."""
        for batch in preds:
            self.close(function(batch), reference(batch))
            self.close(function(list(batch)), reference(batch))

    def run_dtypes(self, kind: type[VisualQualityR1Score], args: dict[str, Any], preds: Tensor) -> None:
        """Pixels of every floating dtype, and a metric moved to every dtype, give float32 scores."""
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            metric = kind(**args).set_dtype(dtype)
            metric.update(preds[0].to(dtype))
            value = metric.to(dtype).compute()
            assert value.dtype == torch.float32 and bool(value.isfinite().all())


def pictures() -> tuple[Tensor, Tensor]:
    """Four batches of two, and targets that nothing depends on."""
    generator = torch.Generator().manual_seed(5)
    preds, target = torch.rand(2, 4, 2, 3, 56, 56, generator=generator)
    return preds, target


def cases(model: str) -> list[tuple[type[VisualQualityR1Score], dict[str, Any]]]:
    """Classes and arguments that one process and two try."""
    common = {"model": model, "device": "cpu", "dtype": "float32"}
    settings: list[dict[str, Any]] = [
        {},
        {"reduction": "none"},
        {"keep_details": True},
        {"reduction": "none", "keep_details": True},
        {"dist_sync_on_step": True},
        {"reduction": "none", "dist_sync_on_step": True},
    ]
    return [*((VisualQualityR1Score, common | more) for more in settings), (Tanh, common)]


def reference_of(scores: Callable[[Tensor], Tensor], kind: type, args: dict[str, Any]) -> Reference:
    """The plain scores of what the class scores, reduced as it reduces."""

    def reference(images: Tensor) -> Tensor:
        found = scores((images + 1) / 2 if kind is Tanh else images)
        return found if args.get("reduction") == "none" else found.mean()

    return reference


def main(rank: int, world: int, folder: str, model: str) -> None:
    from vqr1_metric import QualityScorer

    warnings.filterwarnings("ignore", message=".*of the model's answers")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    scorer, (preds, target) = QualityScorer(model, device="cpu", dtype="float32"), pictures()
    for kind, args in cases(model):
        reference = reference_of(lambda x: torch.tensor([r.score for r in scorer.score(x)]), kind, args)
        MetricTester().run_class(kind, args, preds, target, reference, rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
