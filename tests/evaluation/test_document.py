"""What docs/evaluation.md shows works."""

import re
import shlex
from pathlib import Path

from vqr1_metric.cli import build_parser
from vqr1_metric.evaluation.agreement import STATISTICS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_commands_are_understood() -> None:
    lines = re.findall(r"^    (?:torchrun .* -m vqr1_metric.cli|vqr1) (.*)$", TEXT, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        assert build_parser(words[0]).parse_args(words).command == words[0]


def test_python_runs(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("0.9")


def test_every_figure_is_explained() -> None:
    assert all(f"`{name}`" in TEXT for name in STATISTICS)
