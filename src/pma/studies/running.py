"""Running studies: from names to folders of results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pma.studies import writing
from pma.studies.catalogue import STUDIES, Study, study
from pma.studies.data import find_data
from pma.studies.lab import Lab
from pma.studies.presets import preset
from pma.studies.telling import Told
from pma.studies.workers import pool

INDEX_FILE = "README.md"
BEGIN, END = "<!-- studies -->", "<!-- end of studies -->"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `pma study` was asked for. `seeds`: how many, by default the study's own number. `home`: where
    runs and measurements are kept. `data`: a folder of texts, without which the standard library serves.
    """

    names: tuple[str, ...]
    out: Path
    home: Path
    preset: str = "cpu"
    seeds: int | None = None
    data: Path | None = None
    jobs: int = 1
    minutes: float | None = None

    @property
    def studies(self) -> tuple[Study, ...]:
        """Those that are meant; `all` is every one."""
        return STUDIES if self.names == ("all",) else tuple(study(name) for name in self.names)


def run_studies(request: Request, say: Callable[[str], None]) -> list[tuple[Study, Told]]:
    """Run each and write its folder in `request.out`, then the table of all. What is there of runs and
    measurements is used. Raises UsageError or InputError for what is asked wrongly, Interrupted when the
    time is used up.
    """
    deadline = None if request.minutes is None else time.time() + 60 * request.minutes
    size = preset(request.preset)
    studies = request.studies
    writing.versions()  # what is missing is said now, not after hours
    data = find_data(request.data, size.corpus, size.tasks, request.home)
    told = []
    with pool(request.jobs) as workers:
        for each in studies:
            say(f"{each.name}: {each.title}")
            lab = Lab(
                home=request.home,
                preset=size,
                data=data,
                seeds=each.seeds_of(request.seeds),
                workers=workers,
                deadline=deadline,
                say=say,
            )
            told.append((each, _run(each, lab, request)))
    write_index(request.out)
    return told


def _run(each: Study, lab: Lab, request: Request) -> Told:
    started = time.monotonic()
    results = writing.code_of(each).run(lab)
    how = {
        "preset": request.preset,
        "seeds": list(lab.seeds),
        "command": command(each, request),
        "text": lab.data.text.digest,
        "seconds": time.monotonic() - started,
        "training_seconds": sum(lab.used.values()),
    }
    return writing.write(each, writing.result_of(each, results, how), request.out / each.name)


def redraw(request: Request) -> list[tuple[Study, Told]]:
    """Write README and figure of each again from the result that is there, and the table of all."""
    told = [
        (each, writing.write(each, writing.read(request.out / each.name), request.out / each.name))
        for each in request.studies
    ]
    write_index(request.out)
    return told


def command(each: Study, request: Request) -> str:
    """The command that makes this result again."""
    seeds = request.seeds or each.seeds
    words = ["pma", "study", each.name, "--preset", request.preset, "--seeds", str(seeds)]
    if request.data is not None:
        words += ["--data", "DATA"]
    return shlex.join([*words, "-o", "docs/studies"])


def write_index(out: Path) -> None:
    """Write the table of all studies between its marks in the index, and leave the rest of it alone."""
    path = out / INDEX_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# Studies\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{writing.index(out, STUDIES)}{END}{after}", encoding="utf-8")
