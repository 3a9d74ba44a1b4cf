"""`pma watch`: evaluates each checkpoint, and the merge that ends with it, as the trainer writes them."""

from pma.watch.keeping import Keeper
from pma.watch.landing import Judge, Wanted, settings_key
from pma.watch.loop import Page, State, Watch, run
from pma.watch.points import Point

__all__ = ["Judge", "Keeper", "Page", "Point", "State", "Wanted", "Watch", "run", "settings_key"]
