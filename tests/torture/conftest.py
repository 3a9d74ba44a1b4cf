"""How long to torture: `PMA_TORTURE=10` for ten times as many kills and crashes, `PMA_TORTURE_SEED` for
others.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pma import engine, trajectory
from pma.engine import MergeOptions
from pma.testing import tiny_run


@pytest.fixture(scope="session")
def multiplier() -> int:
    return int(os.environ.get("PMA_TORTURE", "1"))


@pytest.fixture
def chance() -> random.Random:
    return random.Random(int(os.environ.get("PMA_TORTURE_SEED", "0")))


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs take no time there."""
    shared_memory = Path("/dev/shm")
    where = shared_memory if os.access(shared_memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="pma-torture-", dir=where))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The arithmetic is compiled before anything is timed or recorded."""
    folder = tmp_path_factory.mktemp("compiled")
    paths = tiny_run(folder / "run", steps=3)
    for scheme in ("sma", "wma"):
        with engine.plan(trajectory.from_checkpoints(paths).points, MergeOptions(scheme=scheme)) as plan:
            engine.write(plan, folder / scheme)
