"""A report for people: one self-contained HTML file and the same as Markdown, from result records."""

from __future__ import annotations

from spikelm.report.write import write_report

__all__ = ["write_report"]
