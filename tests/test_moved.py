"""A module of 0.1.0 that moved says where it is now."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from vqr1_metric._moved import MODULES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_each_names_a_successor_that_exists(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"of version 0\.1\.0 is now ") as error:
        import_module(name)
    successor = MODULES[name].partition(",")[0]
    assert successor in str(error.value) and find_spec(successor) is not None


def test_both_forms_of_import_say_so() -> None:
    for line in ("from vqr1_metric.backends import vision", "from vqr1_metric.functional import parse_reply"):
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "of version 0.1.0 is now vqr1_metric." in done.stderr, line
