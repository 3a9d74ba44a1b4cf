"""Pure mathematics: weights and accumulation. No files, no clock, no model.

`accumulate` needs a compiler (numba) and is imported where it is used, so that planning does not.
"""

from pma.averaging.decay import decay_weights, rates_from_weights, weights_from_rates
from pma.averaging.weights import equal, given, scheme

#: sources added in one pass over an accumulator; each more saves reading and writing it once
AT_ONCE = 4

__all__ = ["AT_ONCE", "decay_weights", "equal", "given", "rates_from_weights", "scheme", "weights_from_rates"]
