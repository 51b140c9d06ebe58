"""What may not be in the code at all.

Hostile pictures are in test_fuzz.py and serve/test_intake.py, weights in backends/test_loading.py,
pages in evaluation/test_page.py, spreadsheets in test_records.py and evaluation/test_evaluate.py.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("vqr1_metric", "integrations", "examples") for file in (ROOT / folder).rglob("*.py")]
#: These run what they read.
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(tree: ast.AST) -> set[str]:
    """The first words of everything that is imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and keywords of every call, as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords if key.arg}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_pickle_and_no_foreign_code(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not imported(tree) & PICKLERS
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "compile", "os.system"), name
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle", "False") == "False" and keywords.get("shell", "False") == "False"
        assert keywords.get("trust_remote_code", "False") == "False"
