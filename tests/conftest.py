"""Settings for all tests: nothing is fetched, and a noisy machine fails no property test for being slow."""

import os

# before anything imports the libraries that read them
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("pma", deadline=None)
settings.load_profile("pma")
