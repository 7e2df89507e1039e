"""Pictures and pages about formats and weights."""

from dybit.report.curves import curves
from dybit.report.histogram import FormatRow, histogram
from dybit.report.page import write_page

__all__ = ["FormatRow", "curves", "histogram", "write_page"]
