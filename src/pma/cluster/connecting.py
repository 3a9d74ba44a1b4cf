"""A connection to the Ray cluster that is meant, or to one of this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from pma.cluster.nodes import Cluster, OnRay, why
from pma.errors import MissingExtra, StorageError, UsageError, printable

_REACH_SECONDS = 10.0
_LEAST_OBJECT_STORE_BYTES = 80_000_000  # nothing but a few numbers goes through it


@contextmanager
def connected(on: OnRay) -> Iterator[Cluster]:
    """The cluster that is meant, for the block. Raises MissingExtra, UsageError where it has another version,
    StorageError where it does not answer.
    """
    # what Ray will do one day with accelerators of tasks that want none does not concern us
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtra("--on ray", "ray", "Ray") from None
    if ray.is_initialized():  # by whoever called us, who may have more to do
        yield Cluster(ray, on)
        return
    with redirect_stdout(sys.stderr):  # stdout is for results, and Ray would tell there of what was lost
        with _signals_kept():
            # an empty one is none, as it is for Ray
            _connect(ray, on.address or os.environ.get("RAY_ADDRESS") or None)
        try:
            yield Cluster(ray, on)
        finally:
            ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals do after the block what they did before: Ray has SIGTERM exit where it finds the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _connect(ray: Any, address: str | None) -> None:
    if address is not None and address not in ("auto", "local"):
        _check_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == "local":
        _start(ray, quiet)
        return
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError as error:
        if address is not None:
            raise StorageError(f"no Ray cluster answers at {printable(address)}: {why(error)}") from None
        _start(ray, quiet)
    except RuntimeError as error:
        if "version mismatch" in str(error).lower():
            told = " ".join(str(error).split())
            raise UsageError(
                f"the Ray cluster at {printable(address or 'auto')} is of another version: "
                f"{printable(told, 400)}. Use the same Ray and Python on every node and here"
            ) from None
        raise StorageError(f"Ray at {printable(address or 'auto')} cannot be used: {why(error)}") from None
    except ValueError as error:
        raise UsageError(f"--ray-address {printable(address or 'auto')}: {why(error)}") from None


def _start(ray: Any, quiet: dict[str, Any]) -> None:
    """Ray for this machine alone, which ends with this process and tells nobody of its use."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, object_store_memory=_LEAST_OBJECT_STORE_BYTES, **quiet)


def _check_reachable(address: str) -> None:
    """Raises within seconds where Ray itself would try for a minute."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {printable(address)} is a Ray Client's; this process has to be on a node of the "
            "cluster, as it writes the same files: give HOST:PORT as `ray start` showed it"
        )
    host, _, port = address.rpartition(":")
    expected = f"--ray-address {printable(address)}: expected HOST:PORT, as 10.0.0.1:6379"
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(expected)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except UnicodeError:  # of no name of a host: `a..b`, or 64 characters without a dot
        raise UsageError(expected) from None
    except OSError as error:
        raise StorageError(
            f"no Ray cluster answers at {printable(address)}: {error.strerror or error}; is it running "
            "(`ray status`), and is this its address?"
        ) from None
