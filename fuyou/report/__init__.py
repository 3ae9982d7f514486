"""What happened: memory, traffic, stalls."""

from fuyou.report.report import Report

__all__ = ["Report"]
