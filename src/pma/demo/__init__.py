"""The story end to end, told with the verbs that a user has."""

from pma.demo.story import run_demo

__all__ = ["run_demo"]
