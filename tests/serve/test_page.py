"""The page of `vqr1 serve` in a real browser: the examples, scored and ranked, in light and dark, wide and narrow."""

import re
from pathlib import Path

import pytest
from browser import chromium, needs_chromium
from PIL import Image
from stub_scorer import formula_scorer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["lake.jpg", "lake_blurred.jpg", "lake_crushed.jpg", "lake_enlarged.jpg"]


@needs_chromium
def test_examples_are_ranked_as_the_service_ranks_them(serve, tmp_path: Path) -> None:
    with serve(formula_scorer()) as client:
        url = f"{client.base_url}#examples"
        page = chromium(url, tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom")
        files = [("images", (name, client.get(f"/page/examples/{name}").content)) for name in EXAMPLES]
        answer = client.post("/v1/rank", files=files).json()
    shown = re.findall(r'class="name">(.*?)</div><div class="score"><span class="rank">.*?</span>(.*?)</div>', page)
    assert [(name, float(score)) for name, score in shown] == [
        (place["name"], round(answer["results"][place["index"]]["score"], 2)) for place in answer["ranking"]
    ]
    assert page.count('class="mean"') == 4 and page.count("<td style=") == 12  # distributions; win probabilities
    assert "Model: formula." in page and '<p id="problem" role="alert" hidden' in page


@needs_chromium
@pytest.mark.parametrize(("scheme", "back"), [("1", (246, 247, 249)), ("0", (21, 23, 26))], ids=["light", "dark"])
def test_colours_and_width(serve, scheme: str, back: tuple[int, int, int], tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    options = [f"--blink-settings=preferredColorScheme={scheme}", "--hide-scrollbars", "--virtual-time-budget=20000"]
    with serve(formula_scorer()) as client:
        url = f"{client.base_url}#examples"
        chromium(url, tmp_path / "profile", *options, f"--screenshot={picture}", "--window-size=500,1400")
    shown = Image.open(picture).convert("RGB")
    assert shown.getpixel((2, 2)) == back
    # A page that is too wide would draw into its right margin.
    assert shown.crop((shown.width - 8, 0, shown.width, shown.height)).getcolors() == [(8 * shown.height, back)]
