"""Models measured on the nodes of a Ray cluster.

The process that was started drives: it has every node look (`looking`), gives batches of models to processes
that each hold one model at a time (`models`), and hears their results (`measuring`), which it alone keeps.
"""

from pma.evaluation.on_ray.measuring import OnNodes

__all__ = ["OnNodes"]
