"""Ray is imported where it is asked for, and nowhere else."""

import json
import subprocess
import sys
from pathlib import Path

from typer.main import get_command

from pma.cli import app
from pma.testing import tiny_run

ASK = """
import json, sys
import pma
from typer.testing import CliRunner
from pma.cli import app
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (command, done.stderr)
    assert "ray" not in sys.modules, command
"""


def test_commands_that_name_no_engine_import_no_ray(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    names = [*getattr(get_command(app), "commands")]  # noqa: B009
    assert {"merge", "plan", "inspect", "sweep", "eval", "diagnose", "verify"} <= {*names}
    commands = [
        *([name, "--help"] for name in names),
        ["plan", run, "--last", "3", "--nodes", "2", "--read", "1GB/s", "--write", "1GB/s"],
        ["inspect", run],
        ["merge", run, "--last", "3", "-o", out],
        ["verify", out],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(commands)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
