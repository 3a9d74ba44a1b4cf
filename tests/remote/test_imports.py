"""What is on this machine needs no driver of any store."""

import subprocess
import sys
from pathlib import Path

from pma.testing import tiny_run

MERGE = """
import sys
from typer.testing import CliRunner
from pma.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
done = CliRunner().invoke(app, ["merge", sys.argv[1], "--last", "2", "-o", sys.argv[2]])
assert done.exit_code == 0, done.stderr
print([name for name in ("fsspec", "ray", "s3fs", "torch") if name in sys.modules])
"""


def test_help_and_a_merge_here_import_no_fsspec(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=2)
    command = [sys.executable, "-c", MERGE, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
