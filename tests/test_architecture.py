"""The house stands as docs/architecture.md says: imports point downwards, and each fact has one room."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "vqr1_metric"
#: The table of moved names and the lazy re-exports stand outside the floors.
OUTSIDE = {"_moved", "__init__"}

#: A fact, as a pattern over the code without comments and docstrings -> the files and folders that may hold it.
OWNERS = {
    r"</?answer>|</?think>": {"protocol.py"},
    r"You are doing the image quality assessment task": {"protocol.py"},
    r"\bImage\.open\b": {"images/"},
    r"(?i)def _?(srcc|plcc|spearman\w*|pearson\w*)\b": {"functional/agreement.py"},
    r"def (ranking_reward|fidelity|preference_label)\b": {"functional/reward.py"},
    r"(?m)^def (comparison_probability|win_probability)\b": {"functional/thurstone.py"},
    r"\bget_rope_index\b": {"backends/inputs.py"},
    r"def identity\b": {"scorer.py", "ensemble.py", "parts.py", "backends/", "protocol.py"},
    r"argparse": {"cli/", "train_ranker/__main__.py"},
}


def files() -> Iterator[Path]:
    """Every Python file of the package, its integrations at the place where users import them."""
    yield from sorted(PACKAGE.rglob("*.py"))
    yield from (PACKAGE / f.relative_to(ROOT) for f in sorted((ROOT / "integrations").rglob("*.py")))


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def module(file: Path) -> str:
    return ".".join(("vqr1_metric", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@cache
def floors() -> dict[str, int]:
    """Room -> floor, from the page's numbered list: ``3. `scorer`: ...``."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"\d+\. ((?:`\w+`(?:, )?)+)", line) for line in lines]
    rooms = [re.findall(r"`(\w+)`", match[1]) for match in found if match]
    return {room: floor for floor, names in enumerate(rooms) for room in names}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports from the package, TYPE_CHECKING and functions included."""
    package = module(file) if file.name == "__init__.py" else module(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            names = [f"vqr1_metric.{a.name}" for a in node.names] if base == "vqr1_metric" else [base]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in ("vqr1_metric", "recipes"))


def test_the_page_lists_every_room() -> None:
    assert set(floors()) == {room(module(file)) for file in files()} - OUTSIDE


def test_imports_point_downwards() -> None:
    from vqr1_metric import _EXPORTS

    upwards = []
    for file in files():
        here = "cli" if file.name == "__main__.py" else room(module(file))
        for line, name in imports(file):
            if name.startswith("recipes"):
                upwards.append(f"{place(file)}:{line} imports {name}")
                continue
            there = room(_EXPORTS.get(name.removeprefix("vqr1_metric."), name))
            if here in OUTSIDE or there == here or there in ("__version__", *OUTSIDE):
                continue
            if floors()[there] >= floors()[here]:
                upwards.append(f"{place(file)}:{line} imports {name}")
    assert upwards == []


@cache
def code(file: Path) -> str:
    """The code without comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("fact", OWNERS)
def test_each_fact_has_one_room(fact: str) -> None:
    pattern = re.compile(fact)
    holders = {place(file) for file in files() if pattern.search(code(file))}
    assert holders, "nobody holds this fact any more: take it off the table"
    owners = tuple(OWNERS[fact])
    assert [file for file in sorted(holders) if not file.startswith(owners)] == []
