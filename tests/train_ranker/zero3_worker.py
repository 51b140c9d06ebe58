"""Run by torchrun: `vqr1 train` under DeepSpeed on CPUs, which needs its process group made beforehand.

usage: zero3_worker.py ARGUMENTS OF vqr1 train
"""

import os
import sys

import torch.distributed as dist

if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo")
    from vqr1_metric.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
