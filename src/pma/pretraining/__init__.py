"""The reference pre-training: recipes, text, the transformers Trainer, forks that anneal."""

from pma.pretraining.recipe import ANNEALS, Recipe, load_recipe
from pma.pretraining.train import Pretraining, fork, pretrain, resume

__all__ = ["ANNEALS", "Pretraining", "Recipe", "fork", "load_recipe", "pretrain", "resume"]
