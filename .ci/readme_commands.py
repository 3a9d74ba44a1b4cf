"""Every `make` target and `pma` command line in the README and in docs exists, with the flags it shows."""

import re
import shlex
import sys
from pathlib import Path

import typer.main

from pma.cli import app

ROOT = Path(__file__).parent.parent


def lines(text: str) -> list[str]:
    """Command lines in fenced blocks: without prompts and comments, continued lines joined."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split(" # ")[0].strip().removeprefix("$ ") for line in joined.splitlines() if line.strip()]


def problem(line: str) -> str | None:
    """What is wrong with a command line, or None. Only `make` and `pma` are looked at."""
    words = shlex.split(line.replace("…", "x"), comments=True)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return None if set(words[1:]) <= set(targets) else f"no such target: {line}"
    if words[:1] != ["pma"]:
        return None
    group = typer.main.get_command(app)
    command = group.commands.get(words[1]) if len(words) > 1 else None  # type: ignore[attr-defined]
    if command is None:
        return f"no such command: {line}"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in words[2:] if word.startswith("-") and word not in known]
    return f"no such flag {unknown[0]}: {line}" if unknown else None


def main() -> None:
    found, checked = [], 0
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in lines(path.read_text()):
            checked += 1
            if (what := problem(line)) is not None:
                found.append(f"{path.relative_to(ROOT)}: {what}")
    if len((ROOT / "README.md").read_text().splitlines()) >= 200:
        found.append("README.md: 200 lines or more")
    print("\n".join(found) or f"{checked} command lines exist")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
