"""Names in a pickle that no checkpoint needs and that make loading it run a command, open a file, fetch or
evaluate something.

Nothing here decides what may be read: that is a list of each format's own (`unpickling`). This tells an
attack from a trainer's class that is merely not known, for files that a merge carries along unread.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Container

# modules of Python that hold values and nothing that acts
_OF_VALUES = frozenset((
    "array", "collections", "datetime", "decimal", "enum", "fractions", "ipaddress",
    "numbers", "re", "uuid", "zoneinfo",
))  # fmt: skip
# modules of Python that act, with what they were called in Python 2 or are called no longer
_ACTING = (sys.stdlib_module_names | IMPORT_MAPPING.keys() | {"distutils", "imp", "pipes"}) - _OF_VALUES
# packages that load, compile or fetch what they are given
_PACKAGES = frozenset((
    "aiohttp", "cffi", "cloudpickle", "dill", "fsspec", "IPython", "jinja2", "joblib", "nose",
    "numba", "pandas", "pip", "pkg_resources", "pytest", "_pytest", "requests", "setuptools",
    "sympy", "wheel", "yaml",
))  # fmt: skip
_PARTS_OF_PACKAGES = (
    *(f"torch.{part}." for part in (
        "_dynamo", "_inductor", "classes", "distributed.rpc", "fx", "hub", "jit", "library",
        "multiprocessing", "ops", "package", "serialization", "testing", "utils",
    )),
    *(f"numpy.{part}." for part in ("distutils", "f2py", "lib", "testing")),
)  # fmt: skip
# reached through a module that imports them: protocol 4 follows dots
_MODULES_WITHIN = frozenset((
    "builtins", "ctypes", "importlib", "io", "nt", "os", "pickle", "posix", "pty", "runpy",
    "shutil", "socket", "subprocess", "sys",
))  # fmt: skip
_FUNCTIONS = frozenset((
    "attrgetter", "check_call", "check_output", "compile", "delattr", "eval", "exec", "execfile",
    "getattr", "globals", "import_module", "itemgetter", "load", "load_module", "loads",
    "methodcaller", "open", "partial", "popen", "Popen", "run_module", "run_path", "setattr",
    "spawn", "system",
))  # fmt: skip


def acts(name: str) -> bool:
    """Whether a dotted name is of something that acts when a pickle calls it, as far as is known."""
    first, *within = name.split(".")
    if first in _ACTING or first in _PACKAGES or name.startswith(_PARTS_OF_PACKAGES):
        return True
    if any(part.startswith("__") and part.endswith("__") for part in within):
        return True
    # what a module of Python imports it often calls `_os`
    plain = {part.lstrip("_") for part in within}
    if first in _OF_VALUES and plain & _ACTING:
        return True
    return not plain.isdisjoint(_MODULES_WITHIN) or name.rsplit(".", 1)[-1] in _FUNCTIONS


class Harmless:
    """Contains `listed`, and every name that, as far as is known, does nothing when called."""

    def __init__(self, listed: Container[str]) -> None:
        self._listed = listed

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._listed or not acts(name))
