"""The embedded model `nano`: a small vision-language model that judges pictures offline. See MODEL_CARD.md here."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
"""The folder of config, tokenizer, processor settings and weights: a local model folder like any other."""
MODEL_TYPE = "vqr1_nano"
"""Its ``model_type`` in config.json."""
CARD = "card.json"
"""The short form of a model's card, in its folder.

``{"warning": str, "kinds": [{"kind": str, "trust": "scores" | "ordering" | "no", "sentence": str}, ...]}``: one short
line to print beside scores, and for each kind of picture whether to trust its scores, their order inside a scene, or
neither.
"""


def warning_for(folder: str | Path | None) -> str | None:
    """The line that belongs beside the scores of the model in this folder; None if its card states none.

    Args:
        folder: a model folder, or None for a model that is not in one (a name on a hub, a server).
    """
    path = Path(folder) / CARD if folder is not None else None
    if path is None or not path.is_file():
        return None
    warning = json.loads(path.read_text(encoding="utf-8")).get("warning")
    return str(warning) if warning else None
