"""Score a folder of pictures with Ray Data: here in two processes of this machine, on a cluster with its address.

    pip install 'vqr1-metric[ray]'
    python examples/ray_scoring.py --images FOLDER --output scores
    python examples/ray_scoring.py --images /shared/photos --output s3://bucket/scores --workers 64 --num-gpus 1

Interrupt it and start it again: it goes on with the pictures that are not in the output yet.
"""

import argparse
from pathlib import Path

import ray

from vqr1_metric.images import SUFFIXES
from vqr1_metric.integrations.ray import score_to_parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--output", default="scores", help="folder or URI for the Parquet files")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-gpus", type=float, default=0, help="of each worker")
    args = parser.parse_args()

    ray.init(ignore_reinit_error=True)
    paths = sorted(str(f.absolute()) for f in args.images.rglob("*") if f.suffix.lower() in SUFFIXES)
    scored = score_to_parquet(
        ray.data.from_items([{"path": path} for path in paths]),
        args.output,
        model=args.model,
        concurrency=args.workers,
        num_gpus=args.num_gpus,
    )
    rows = sorted(scored.take_all(), key=lambda row: -row["score"])
    for row in rows[:20]:
        print(f"{row['score']:.3f}  {Path(row['path']).name}{'  ' + row['error'] if row['error'] else ''}")
    print(f"{len(rows)} pictures in {args.output}")


if __name__ == "__main__":
    main()
