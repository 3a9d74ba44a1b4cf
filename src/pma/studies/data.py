"""The texts of the studies: a folder of data where there is one, else what is present wherever Python is."""

from __future__ import annotations

import ast
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pma.errors import InputError
from pma.evaluation.text import SEPARATOR
from pma.pretraining.corpus import standard_library

OTHER_DOMAIN, INSTRUCTIONS, EVALS = "ct_math.txt.xz", "sft.jsonl.xz", "evals.tar.xz"
_SHORTEST_RESPONSE = 20


@dataclass(frozen=True, kw_only=True)
class Text:
    """Texts by path, and a digest of their content: the same text elsewhere is the same."""

    paths: tuple[Path, ...]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        """The paths, absolute, as a run records them."""
        return tuple(str(path.resolve()) for path in self.paths)

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Text:
        """The texts at `paths`; none is the embedded default."""
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} is missing; expected a file of the studies' data")
        digests = [blake3(path.read_bytes()).hexdigest() for path in paths]
        return cls(paths=tuple(paths), digest=blake3(" ".join(digests).encode()).hexdigest() if paths else "")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the studies read: text to pre-train on, text of another domain, instructions, tasks by file."""

    text: Text
    other_domain: Text
    instructions: Text
    tasks: tuple[Path, ...]


def find_data(folder: Path | None, corpus: str, tasks: Sequence[str], home: Path) -> Data:
    """The data in `folder`; without one, the Python standard library: its modules, its documentation, its
    docstrings, and no tasks. What has to be made or unpacked goes into `home`.

    Raises InputError where `folder` lacks a file.
    """
    if folder is None:
        return Data(
            text=Text.of(()),
            other_domain=Text.of([documentation(home)]),
            instructions=Text.of([docstrings(home)]),
            tasks=(),
        )
    return Data(
        text=Text.of([folder / corpus]),
        other_domain=Text.of([folder / OTHER_DOMAIN]),
        instructions=Text.of([folder / INSTRUCTIONS]),
        tasks=tuple(_unpacked(folder / EVALS, f"evals/{name}.jsonl", home) for name in tasks),
    )


def _unpacked(archive: Path, member: str, home: Path) -> Path:
    target = home / "tasks" / Path(member).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(archive) as tar:
                source = tar.extractfile(member)
                data = source.read() if source is not None else b""
        except (OSError, tarfile.TarError, KeyError) as error:
            raise InputError(f"{archive} has no {member} that can be read: {error}") from error
        partial = target.with_suffix(".partial")
        partial.write_bytes(data)
        partial.rename(target)
    return target


def documentation(home: Path) -> Path:
    """Another domain than source: the language reference that Python carries for its own help, a topic a
    document.
    """
    from pydoc_data.topics import topics

    return _written(
        home / "documentation.txt", f"\n{SEPARATOR}\n".join(topics[name] for name in sorted(topics))
    )


def docstrings(home: Path) -> Path:
    """Instructions and responses: the head of a function of the standard library, and the first line of its
    docstring.
    """
    rows = []
    for document in standard_library():
        for node in _functions(document.text):
            line = (ast.get_docstring(node) or "").strip().split("\n")[0]
            if len(line) >= _SHORTEST_RESPONSE:
                prompt = f"def {node.name}({', '.join(a.arg for a in node.args.args)}):"
                rows.append(json.dumps({"prompt": prompt, "response": line}))
    return _written(home / "docstrings.jsonl", "\n".join(dict.fromkeys(rows)) + "\n")


def _functions(source: str) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
    return path
