"""Run by tests/evaluation/test_scoring.py, once for each process: score a folder's pictures, print the rows."""

import json
import sys
from pathlib import Path

import torch
from stub_scorer import LinearBackend

from vqr1_metric.evaluation import scoring
from vqr1_metric.ratings import RatedImage
from vqr1_metric.ratings.lookup import image_files
from vqr1_metric.scorer import QualityScorer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, cache = map(Path, sys.argv[1:3])
    scoring.CHUNK = 4
    items = [RatedImage(path.name, path=path) for path in image_files(folder)]
    backend = LinearBackend()
    rows = scoring.score_items(QualityScorer(backend=backend), items, cache)
    print(json.dumps({"pictures": backend.pictures, "rows": rows}))
