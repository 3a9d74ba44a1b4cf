"""Asks `crew_server.py` for merges by several processes, some of which are killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pma.testing import tiny_run


class Server:
    """One such process, with the environment of now."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).with_name("crew_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        sources = [str(path) for path in tiny_run(folder / "tiny", steps=3)]
        assert self.ask({"sources": sources, "out": str(folder / "warm"), "size": 1})["ready"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """What became of a merge; see `crew_server.py`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        crashed = [said for said in answer["outcomes"].values() if "Traceback" in str(said)]
        assert not crashed, crashed[0]
        return answer

    def close(self) -> None:
        self._process.communicate()
