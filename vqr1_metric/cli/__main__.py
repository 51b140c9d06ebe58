"""``python -m vqr1_metric.cli``: the same as ``vqr1``."""

import sys

from vqr1_metric.cli import main

sys.exit(main())
