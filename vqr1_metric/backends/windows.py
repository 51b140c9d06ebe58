"""A faster vision tower: attention over all windows at once, patches embedded by a matrix product.

Without FlashAttention installed, the Qwen-VL towers of transformers attend to one window after the other in a Python
loop (a picture of 1024x768 has some 80 windows, in 28 of Qwen2.5-VL's 32 layers), and embed patches with a 3-d
convolution whose kernel is its stride, which is a matrix product done slowly. Here windows of equal length go through
one call, or, on CUDA in half precision, all of them through torch's own variable-length attention. Results equal those
of the stock tower but for rounding; gradients pass.

The attention is registered with transformers under the name :data:`ATTENTION`; any of its Qwen-VL models takes it:
``register_attention(); model.set_attn_implementation({"vision_config": ATTENTION})``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from vqr1_metric.backends.base import Model

#: Its name among the attentions of transformers, which give a whole picture and its windows (``cu_seq_lens_q``) only to
#: one with "flash" in its name, and loop over the windows for all others.
ATTENTION = "vqr1_flash_windows"
#: On a CPU, windows up to this length, and in 16 bits all, are faster as plain matrix products, for so many rows at a
#: time, than in the fused kernel.
_ROWS = 128


def speed_up(model: Model) -> None:
    """Let a loaded Qwen-VL model's vision tower use the attention below, and its modules the forwards below."""
    register_attention()
    model.set_attn_implementation({"vision_config": ATTENTION})
    for module in model.model.visual.modules():
        if hasattr(module, "qkv") and hasattr(module, "num_heads"):
            replace_forward(module, _attention_forward)
        elif isinstance(conv := getattr(module, "proj", None), torch.nn.Conv3d) and conv.kernel_size == conv.stride:
            replace_forward(module, _patch_embedding_forward)


def register_attention() -> None:
    """Make the attention over windows known to transformers as :data:`ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _registered_attention)


def _registered_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: ``(1, heads, S, dim)`` in, ``(1, S, heads, dim)`` out."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return windowed_attention(query, key, value, cu_seq_lens_q, scaling)[None], None


def replace_forward(module: torch.nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let a loaded module run ``forward(module, ...)`` from now on."""
    # accelerate's hooks (device_map) keep the module's own forward under this name and call it from theirs.
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    setattr(module, name, partial(forward, module))  # unlike a bound function, a partial can be pickled


def _patch_embedding_forward(self: Model, hidden_states: Tensor) -> Tensor:
    weight = self.proj.weight
    if weight.is_meta:  # accelerate brings offloaded weights back when their own module is called
        return cast(Tensor, type(self).forward(self, hidden_states))
    return linear(hidden_states.to(weight.dtype).flatten(1), weight.flatten(1), self.proj.bias)


def _attention_forward(
    self: Model,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The module's own forward but for the rotary positions, which take two fused steps here instead of five."""
    if self.config._attn_implementation != ATTENTION:  # somebody has chosen another since
        attended = type(self).forward(
            self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
        return cast(Tensor, attended)
    qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
    cos, sin = cast(tuple[Tensor, Tensor], position_embeddings)  # every tower gives them
    query, key = rotate(qkv[:, :2], cos, sin).unbind(1)
    attended = windowed_attention(query, key, qkv[:, 2], cu_seqlens, self.scaling)
    return cast(Tensor, self.proj(attended.flatten(1)))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on ``(S, 2, heads, dim)``, in float32 or wider; cos and sin are ``(S, dim)``."""
    half = states.shape[-1] // 2
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    cos, sin = cos.to(wide.dtype)[:, None, None], sin.to(wide.dtype)[:, None, None, :half]
    rotated = wide * cos
    rotated[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(wide[..., :half], sin)
    return rotated.to(states.dtype)


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, *, causal: bool = False
) -> Tensor:
    """Attention inside consecutive windows.

    Args:
        query, key, value: ``(S, heads, dim)``, the windows one after the other.
        cu_seqlens: int32 ``(windows + 1,)``, where each window begins, and S.
        scale: of the scores.
        causal: whether a row sees those of its window up to itself only.

    Returns:
        ``(S, heads, dim)``.
    """
    groups, order = _window_groups(cu_seqlens)
    options = {"scale": scale} | ({"window_size": (-1, 0)} if causal else {})  # how far to the left and to the right
    if variable_length := _variable_length(query, frozenset(options)):
        longest = max(length for length, _ in groups)
        return variable_length(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    if len(groups) == 1:
        return _equal_windows(query, key, value, groups[0][0], scale, causal)
    states = torch.stack([query, key, value])
    parts = []
    for length, rows in groups:
        query, key, value = states[:, rows]
        parts.append(_equal_windows(query, key, value, length, scale, causal))
    return torch.cat(parts)[order]


def _variable_length(query: Tensor, options: frozenset[str]) -> Callable[..., Tensor] | None:
    """torch's variable-length attention, where it can take these."""
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    return _varlen_attn(options) if fits and torch.cuda.get_device_capability(query.device) >= (8, 0) else None


@cache
def _varlen_attn(options: frozenset[str]) -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # a second of imports, so not before it is needed
    except ImportError:  # torch before 2.10
        return None
    takes_them = options <= signature(varlen_attn).parameters.keys()
    return cast(Callable[..., Tensor], varlen_attn) if takes_them else None  # not asked for more, it gives one tensor


def _window_groups(cu_seqlens: Tensor) -> tuple[list[tuple[int, Tensor]], Tensor | None]:
    """``(length, rows)`` of the windows of each length, and the order that puts the rows back."""
    # The same tensor comes to every layer: kept on it, so that a GPU is waited for once and not in each of them.
    found: tuple[list[tuple[int, Tensor]], Tensor | None] | None = getattr(cu_seqlens, "_window_groups", None)
    if found is None:
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        groups, order = [], None
        for length in sorted({*lengths} - {0}):
            first = torch.tensor([start for start, n in zip(starts, lengths, strict=False) if n == length])
            groups.append((length, (first[:, None] + torch.arange(length)).flatten().to(cu_seqlens.device)))
        if len(groups) > 1:
            order = torch.cat([rows for _, rows in groups]).argsort()
        found = groups, order
        cu_seqlens._window_groups = found  # type: ignore[attr-defined]  # a tensor takes any attribute
    return found


def _equal_windows(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float, causal: bool) -> Tensor:
    """Attention inside windows of one length, ``(windows * length, heads, dim)``."""
    query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    narrow = query.dtype.itemsize == 2 and not query.requires_grad  # for gradients all products would be kept
    if query.device.type == "cpu" and not causal and (length <= _ROWS or narrow):
        value, keys = value.contiguous(), key.mT.contiguous()
        parts = [(rows @ keys).softmax(-1) @ value for rows in (query * scale).split(_ROWS, dim=2)]
        attended = torch.cat(parts, dim=2)
    else:
        attended = scaled_dot_product_attention(query, key, value, scale=scale, is_causal=causal)
    return attended.transpose(1, 2).flatten(0, 1)
