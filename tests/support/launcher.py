"""Runs of several processes on this machine, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

#: Seconds; a run takes some 20 on an idle machine, on a busy one it took 300.
PATIENCE = 1200


def launch(*command: str | Path, processes: int = 2) -> subprocess.Popen:
    """Start ``torchrun``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its processes."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(one.pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)  # or they go on after the test
        raise
    assert process.returncode == 0, output[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
