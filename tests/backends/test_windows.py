"""The faster vision tower equals the stock one, in values and gradients."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageTextToText

from tolerances import relative_error
from vqr1_metric.backends import windows
from vqr1_metric.backends.pixels import PixelConfig, to_patches

SIZES = [(112, 112), (300, 260), (100, 640), (64, 64), (130, 131), (300, 260)]


def tower_inputs(folder, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    config = PixelConfig.from_file(folder / "preprocessor_config.json").with_limits(min_pixels=64 * 64)
    wide = torch.promote_types(dtype, torch.float32)
    patches, grids = zip(*(to_patches(torch.rand(3, *size), config, wide) for size in SIZES), strict=True)
    return torch.cat(patches), torch.tensor(grids)


def by_name_alone(model):
    windows.register_attention()
    model.set_attn_implementation({"vision_config": windows.ATTENTION})


@pytest.mark.parametrize("made_fast", [windows.speed_up, by_name_alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_stock_tower(tiny_model, dtype: torch.dtype, made_fast, monkeypatch):
    stock = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=dtype, attn_implementation="sdpa")
    fast = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=dtype, attn_implementation="sdpa")
    made_fast(fast)
    calls = count_calls(monkeypatch, windows, "windowed_attention")
    # The stock tower once more, in float64 with the weights of this format, is what both are held against.
    exact = copy.deepcopy(stock).double()
    patches, grids = tower_inputs(tiny_model, dtype)
    results = []
    for model in (exact, stock, fast):
        pixels = patches.to(model.dtype, copy=True).requires_grad_()
        output = model.requires_grad_(False).model.visual(pixels, grid_thw=grids).pooler_output
        output.double().square().mean().backward()
        results.append((output.detach(), pixels.grad))
    assert len(calls) == 2  # once in each layer of the fast one, however many windows
    for wanted, theirs, ours in zip(*results, strict=True):
        assert float(wanted.abs().max()) > 0
        # As good as the stock tower; transformers' own norms and rotations round a float64 model to float32.
        floor = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert relative_error(ours, wanted) <= 4 * relative_error(theirs, wanted) + floor
    assert float(results[0][0].std()) > 0.1


def count_calls(monkeypatch, module, name: str) -> list:
    calls, function = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("lengths", [[64] * 5, [64, 64, 32, 64, 16, 300, 32], [200, 200], [7]])
@pytest.mark.parametrize("causal", [False, True])
def test_each_window_attends_to_itself(lengths: list[int], causal: bool):
    states = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    expected = [
        scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in window), scale=0.3, is_causal=causal)[
            0
        ].transpose(0, 1)
        for window in states.split(lengths, dim=1)
    ]
    output = windows.windowed_attention(*states, starts, 0.3, causal=causal)
    torch.testing.assert_close(output, torch.cat(expected), atol=1e-12, rtol=0)


def test_every_attention_and_embedding_is_replaced(tiny_model):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    windows.speed_up(model)
    assert sum("forward" in vars(module) for module in model.model.visual.modules()) == 3  # two layers, one embedding


def test_another_attention_chosen_later_is_the_stock_one(tiny_model, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    windows.speed_up(model)
    calls = count_calls(monkeypatch, windows, "windowed_attention")
    patches, grids = tower_inputs(tiny_model, torch.float32)
    fast = model.model.visual(patches, grid_thw=grids).pooler_output
    assert len(calls) == 2
    model.set_attn_implementation({"vision_config": "sdpa"})
    torch.testing.assert_close(model.model.visual(patches, grid_thw=grids).pooler_output, fast, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2


def test_a_saved_model_does_not_name_it(tiny_model, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    windows.speed_up(model)
    assert model.config._attn_implementation == model.config.get_text_config()._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert windows.ATTENTION not in (tmp_path / "config.json").read_text()


def test_copies_use_their_own_weights(tiny_qwen2_5_vl):
    model = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl)
    windows.speed_up(model)
    patches, grids = tower_inputs(tiny_qwen2_5_vl, torch.float32)
    expected = model.model.visual(patches, grid_thw=grids).pooler_output
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        torch.testing.assert_close(copied.model.visual(patches, grid_thw=grids).pooler_output, expected)
        model.load_state_dict(copied.state_dict())


@pytest.mark.parametrize("causal", [False, True])
def test_variable_length_attention_gets_the_windows(monkeypatch, causal: bool):
    """What a GPU is asked for; the function itself needs one (tests/test_gpu.py)."""
    asked = []

    def recorded(query, key, value, starts_q, starts_k, longest_q, longest_k, **options):
        asked.append((starts_q.tolist(), starts_k.tolist(), longest_q, longest_k, options))
        return query

    monkeypatch.setattr(windows, "_variable_length", lambda query, options: recorded)
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    windows.windowed_attention(*torch.randn(3, 10, 2, 8), starts, 0.5, causal=causal)
    options = {"scale": 0.5} | ({"window_size": (-1, 0)} if causal else {})
    assert asked == [([0, 4, 10], [0, 4, 10], 6, 6, options)]
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 and later")
    if {"scale", "window_size"} <= inspect.signature(varlen.varlen_attn).parameters.keys():
        assert windows._varlen_attn(frozenset(options)) is varlen.varlen_attn
    assert windows._varlen_attn(frozenset({"scale", "made_up"})) is None
