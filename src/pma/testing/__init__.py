"""For authors of formats and for our own tests: conformance suites, a reference twin, builders of real
checkpoints, tiny ones and one giant.
"""

from pma.testing.builders import Raw, random_raw, store_mean, tiny_llama_run, tiny_run
from pma.testing.contracts import ReaderContract, WriterContract
from pma.testing.giant import giant_run
from pma.testing.reference import reference_average, rounded

__all__ = [
    "Raw",
    "ReaderContract",
    "WriterContract",
    "giant_run",
    "random_raw",
    "reference_average",
    "rounded",
    "store_mean",
    "tiny_llama_run",
    "tiny_run",
]
