"""Pure mathematics: weights and accumulation. No files, no clock, no model.

`accumulate` needs torch and is imported where it is used, so that planning does not.
"""

from pma.averaging.decay import decay_weights, rates_from_weights, weights_from_rates
from pma.averaging.weights import equal, given, scheme

__all__ = ["decay_weights", "equal", "given", "rates_from_weights", "scheme", "weights_from_rates"]
