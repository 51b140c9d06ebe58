"""What a user installs: wheel, sdist and editable installs hold every package, and importing them is cheap."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
# What the build reads; anything else in a checkout (environments, results) must not get into it.
SOURCES = ("vqr1_metric", "integrations", "examples", "tests", "benchmarks", "recipes")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command, its error output in the failure message."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def python(code: str, *, cwd: Path) -> str:
    """Run code in a fresh interpreter of this environment, away from the checkout."""
    return run(sys.executable, "-c", code, cwd=cwd).strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "vqr1"
    copy.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for folder in SOURCES:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--wheel-dir", folder, source], cwd=folder)
    return next(folder.glob("*.whl"))


def pip(arguments: list[str | Path], *, cwd: Path) -> None:
    """pip with nothing fetched: no dependencies, and the build runs on the setuptools of this environment."""
    action, *rest = arguments
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", action, *options, *rest, cwd=cwd)


def import_from(site: Path, cwd: Path) -> tuple[Path, Path]:
    """Where the package and its integrations come from when only ``site`` is installed (-S: no other site folder)."""
    code = (
        f"import site; site.addsitedir({str(site)!r})\n"
        "import vqr1_metric, vqr1_metric.integrations\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('integrations') is None, 'a top-level package integrations was installed'\n"
        "print(vqr1_metric.__file__); print(vqr1_metric.integrations.__file__)"
    )
    package, integrations = run(sys.executable, "-I", "-S", "-c", code, cwd=cwd).splitlines()
    return Path(package), Path(integrations)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_holds_integrations(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip(["install", "--target", site, request.getfixturevalue(kind)], cwd=tmp_path)
    package, integrations = import_from(site, tmp_path)
    assert package == site / "vqr1_metric" / "__init__.py"
    assert integrations == site / "vqr1_metric" / "integrations" / "__init__.py"
    assert not (site / "integrations").exists()


def test_editable_install_holds_integrations(source: Path, tmp_path: Path) -> None:
    # --ignore-installed: without it pip would remove the checkout's own editable install.
    pip(["install", "--ignore-installed", "--prefix", tmp_path / "prefix", "--editable", source], cwd=tmp_path)
    (info,) = (tmp_path / "prefix").rglob("vqr1_metric-*.dist-info")
    package, integrations = import_from(info.parent, tmp_path)
    assert package == source / "vqr1_metric" / "__init__.py"
    assert integrations.resolve() == (source / "integrations" / "__init__.py").resolve()


def test_every_package_folder_is_listed() -> None:
    files = [f.relative_to(ROOT) for f in (ROOT / "vqr1_metric").rglob("*.py")]
    files += [Path("vqr1_metric", f.relative_to(ROOT)) for f in (ROOT / "integrations").rglob("*.py")]
    found = {".".join(file.parent.parts) for file in files}
    assert sorted(PACKAGES) == sorted(found), "[tool.setuptools] packages in pyproject.toml must list every package"
    mapped = PYPROJECT["tool"]["setuptools"]["package-dir"]
    for name in PACKAGES:
        folder = name.replace("vqr1_metric.integrations", "integrations").replace(".", "/")
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has Python files but no __init__.py"
        assert not name.startswith("vqr1_metric.integrations") or mapped["vqr1_metric.integrations"] == "integrations"


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA")]
        (scripts,) = [archive.read(n).decode() for n in names if n.endswith(".dist-info/entry_points.txt")]
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vqr1_metric", next(t for t in tops if t.endswith(".dist-info"))}
    modules = {f.relative_to(ROOT).as_posix() for f in (ROOT / "vqr1_metric").rglob("*.py")}
    modules |= {"vqr1_metric/" + f.relative_to(ROOT).as_posix() for f in (ROOT / "integrations").rglob("*.py")}
    assert modules | {"vqr1_metric/py.typed"} <= names
    # The embedded model and everything beside it: a file that package-data forgets would be missed only by users.
    nano = ROOT / "vqr1_metric" / "nano"
    data = {f.relative_to(ROOT).as_posix() for f in nano.glob("*") if f.is_file() and f.suffix != ".py"}
    assert data <= names
    if (nano / "config.json").exists():
        assert {"vqr1_metric/nano/model.safetensors", "vqr1_metric/nano/tokenizer.json"} <= names
        assert wheel.stat().st_size < 14e6  # 12 MB of weights at most, and the code
    assert "vqr1 = vqr1_metric.cli:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {_version()}" in metadata


def test_sdist_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt"}
    wanted |= {"integrations/__init__.py", "vqr1_metric/py.typed", "tests/support/tiny_models.py"}
    for folder in ("examples", "benchmarks"):
        files = (f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        wanted |= {f.relative_to(ROOT).as_posix() for f in files}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".", "shared")) or name.endswith(".pyc")]


def test_version_is_stated_once_and_repeated_rightly() -> None:
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == _version()
    assert "version" in PYPROJECT["project"]["dynamic"]


def _version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "vqr1_metric" / "__init__.py").read_text(), re.M)[1]


def test_pins_agree_with_the_ranges() -> None:
    from packaging.requirements import Requirement

    core = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
    extras = [Requirement(line) for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines]
    for file in ("constraints.txt", "constraints-lowest.txt"):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        pins = dict(line.split("==") for line in lines)
        assert {need.name for need in core} <= set(pins), f"{file} must pin every core dependency"
        for need in core + extras:
            if need.name not in pins:
                continue
            assert need.specifier.contains(pins[need.name]), f"{file} pins {need.name} outside {need.specifier}"
            lowest = next(part.version for part in need.specifier if part.operator == ">=")
            if file == "constraints-lowest.txt" and need.name != "torch":  # why not torch: see that file
                assert f"{pins[need.name]}.".startswith(f"{lowest}."), f"{file} must pin {need.name} to about {lowest}"


def test_core_dependencies_work_together() -> None:
    # Lazy modules import nothing until a name is taken: diffusers 0.35 installs beside transformers 5 and fails here.
    from accelerate import dispatch_model
    from diffusers import DiffusionPipeline
    from torchmetrics import Metric
    from transformers import Qwen2_5_VLForConditionalGeneration

    assert all(map(callable, (dispatch_model, DiffusionPipeline, Metric, Qwen2_5_VLForConditionalGeneration)))


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; import vqr1_metric\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'torchmetrics', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(len(sys.modules))"
    )
    assert int(python(code, cwd=tmp_path)) < 200


def test_lazy_names() -> None:
    import vqr1_metric

    assert set(vqr1_metric.__all__) <= set(dir(vqr1_metric))
    with pytest.raises(AttributeError, match="no attribute 'VisualQuality'"):
        _ = vqr1_metric.VisualQuality
    for name in vqr1_metric.__all__:
        assert getattr(vqr1_metric, name) is getattr(vqr1_metric, name)


def test_maths_imports_only_torch_and_the_standard_library(tmp_path: Path) -> None:
    modules = sorted(f.stem for f in (ROOT / "vqr1_metric" / "functional").glob("[!_]*.py"))
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"for name in {modules!r}: __import__('vqr1_metric.functional.' + name)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'torch', 'vqr1_metric'}))\n"
        "own = {n for n in set(sys.modules) - before if n.startswith('vqr1_metric.')} - {'vqr1_metric._moved'}\n"
        "print(*sorted(n for n in own if 'functional' not in n))"
    )
    assert modules
    assert python(code, cwd=tmp_path) == "", "functional may import torch and the standard library only"


def test_script_is_installed() -> None:
    name = "vqr1.exe" if os.name == "nt" else "vqr1"
    assert Path(sys.executable).with_name(name).is_file()
