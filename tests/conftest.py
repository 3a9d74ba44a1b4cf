"""Settings for all tests: a noisy machine must not fail a property test for being slow."""

from hypothesis import settings

settings.register_profile("pma", deadline=None)
settings.load_profile("pma")
