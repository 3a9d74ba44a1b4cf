"""What annealing would give: laws of annealing fitted to loss curves, and forecasts with intervals."""

from pma.forecast.forecasting import Forecast, Learned, forecast, forecast_of, learn
from pma.forecast.laws import LAWS
from pma.forecast.requests import Anneal, Request, Target, request

__all__ = [
    "LAWS",
    "Anneal",
    "Forecast",
    "Learned",
    "Request",
    "Target",
    "forecast",
    "forecast_of",
    "learn",
    "request",
]
