"""What this machine's processor does well."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch


@contextmanager
def fast_products() -> Iterator[None]:
    """Float32 matrix products through oneDNN where that is faster and as exact.

    torch sends them to MKL, which leaves the 512-bit units of processors that are not Intel's unused (Zen 5: 108
    against 240 GFLOP/s a core). The switch that sends them to oneDNN instead is the one that allows bfloat16 inside the
    products; a processor without matrix units for that computes in float32 all the same, which is checked.
    """
    if not _onednn_is_faster():
        yield
        return
    _switch.turn_on()
    try:
        yield
    finally:
        _switch.turn_off()


class _Switch:
    """The switch is one for the process: the first thread that wants it turns it on, the last one turns it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._before = ""

    def turn_on(self) -> None:
        with self._lock:
            if self._wanted == 0:
                matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch 2.9 and later
                self._before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            self._wanted += 1

    def turn_off(self) -> None:
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                torch.backends.mkldnn.matmul.fp32_precision = self._before  # type: ignore[attr-defined]


_switch = _Switch()


@cache
def _onednn_is_faster() -> bool:
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later
    if not hasattr(matmul, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() in ("GenuineIntel", None):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=generator) - 0.5 for _ in range(2))
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        error = (a @ b).double() - a.double() @ b.double()
    finally:
        matmul.fp32_precision = before
    return float(error.abs().max()) < 1e-5  # bfloat16 products are off by 1e-2


def _vendor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), None)
