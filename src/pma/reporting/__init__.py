"""Tables, charts and the HTML report."""

from pma.reporting.report import PAGE_FILE, RESULTS_FILE, report_folder, series_from_log
from pma.reporting.table import comparison_table
from pma.reporting.tasks_table import tasks_table
from pma.reporting.watch_page import Watched, points_table, thinned, watch_lead, watch_page

__all__ = [
    "PAGE_FILE",
    "RESULTS_FILE",
    "Watched",
    "comparison_table",
    "points_table",
    "report_folder",
    "series_from_log",
    "tasks_table",
    "thinned",
    "watch_lead",
    "watch_page",
]
