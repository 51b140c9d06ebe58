"""Float32 products stay float32, whatever library computes them, and the switch is put back."""

import pytest
import torch

from vqr1_metric.backends import cpu


@pytest.fixture
def onednn(monkeypatch):
    """A processor that is not Intel's, whatever this one is."""
    monkeypatch.setattr(cpu, "_vendor", lambda: "AuthenticAMD")
    cpu._onednn_is_faster.cache_clear()
    yield
    cpu._onednn_is_faster.cache_clear()


def test_products_are_float32(onednn):
    a, b = torch.randn(2, 300, 300)
    with cpu.fast_products():
        product = a @ b
    assert float((product.double() - a.double() @ b.double()).abs().max()) < 1e-4


def test_the_switch_is_put_back_after_an_error(onednn):
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    with pytest.raises(KeyError), cpu.fast_products():
        raise KeyError
    assert getattr(matmul, "fp32_precision", None) == before
    torch.get_float32_matmul_precision()  # raises where old and new settings contradict each other


@pytest.mark.parametrize("vendor", ["GenuineIntel", None])
def test_an_intel_or_unknown_processor_keeps_torch_s_choice(onednn, monkeypatch, vendor):
    monkeypatch.setattr(cpu, "_vendor", lambda: vendor)
    assert not cpu._onednn_is_faster()
