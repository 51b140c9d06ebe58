"""The embedded model `nano`: a small Qwen2.5-VL that judges pictures offline. See MODEL_CARD.md in this folder."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""The folder of config, tokenizer, processor settings and weights: a local model folder like any other."""
