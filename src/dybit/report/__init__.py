"""Pictures and pages about formats and weights. Must not be imported by any room but the command line."""

from dybit.report.curves import curves
from dybit.report.histogram import FormatRow, histogram
from dybit.report.page import write_page

__all__ = ["FormatRow", "curves", "histogram", "write_page"]
