"""The reference pre-training: recipes, text, the transformers Trainer, forks that anneal, later stages."""

from pma.pretraining.further import further
from pma.pretraining.recipe import ANNEALS, SCHEDULES, Recipe, load_recipe
from pma.pretraining.train import Pretraining, fork, pretrain, resume

__all__ = [
    "ANNEALS",
    "SCHEDULES",
    "Pretraining",
    "Recipe",
    "fork",
    "further",
    "load_recipe",
    "pretrain",
    "resume",
]
