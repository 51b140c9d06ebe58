"""``python -m vqr1_metric.train_ranker`` is ``vqr1 train``: the form that torchrun and accelerate launch take."""

import sys

from vqr1_metric.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
