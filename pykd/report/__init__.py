"""What runs say, in tables and figures."""

from pykd.report.comparison import compared, markdown
from pykd.report.figures import error_against_bytes, error_against_k, log_alpha, sparsity

__all__ = ["compared", "error_against_bytes", "error_against_k", "log_alpha", "markdown", "sparsity"]
