"""What README and docs show works: Python blocks run, commands are ones that the program has."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from vqr1_metric.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE = ROOT / "docs" / "command_line.md"


@pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
def test_python_of_the_readme(tmp_path: Path, tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    for name, colour in (("photo.jpg", "teal"), ("other.jpg", "olive")):
        Image.new("RGB", (120, 90), colour).save(name)
    for block in blocks:
        assert '"nano"' in block
        exec(block.replace('"nano"', repr(str(tiny_qwen2_5_vl))), {})
        assert capsys.readouterr().out


@pytest.mark.parametrize("document", [ROOT / "README.md", COMMAND_LINE], ids=lambda path: path.name)
def test_commands_are_understood(document: Path):
    lines = re.findall(r"^ *(vqr1 (?!COMMAND).*?)(?:  .*)?$", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 3
    parser = build_parser()
    for line in lines:
        words = shlex.split(line.replace("PATH...", "PATH"), comments=True)
        assert parser.parse_args(words[1:]).command == words[1]
