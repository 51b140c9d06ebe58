"""A torchvision in which every name exists and does nothing.

pyiqa and BasicSR import torchvision at the top of files whose other parts are wanted here, and the torchvision on PyPI
does not load beside the CPU build of torch that the tests run on.
"""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Empty(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module) -> None:
        pass


@contextmanager
def empty_torchvision():
    """While it lasts, ``import torchvision`` finds the empty one, unless there is a real one."""
    if find_spec("torchvision"):
        yield
        return
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
