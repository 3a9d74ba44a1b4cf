"""Settings for all tests: nothing is fetched, a noisy machine fails no property test for being slow, and the
commands that tests interrupt hear it.
"""

import os
import signal

# before anything imports the libraries that read them
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("pma", deadline=None)
settings.load_profile("pma")

# a shell's `make test &` has everything below it ignore Ctrl-C, and a test of it would wait for ever
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
