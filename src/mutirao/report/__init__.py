"""A run shown to people: one self-contained page, and the same tables in the terminal.

It reads only what the stages left on disk: artifacts, their manifests and the JSON files in
them. No model is loaded and no stage is imported but ``evaluate``, whose results it reads.
``federation`` shows a coordinator's folder and what left a site, in the same style.
"""

from mutirao.report.collect import summarize
from mutirao.report.page import write_report
from mutirao.report.summary import RunSummary
from mutirao.report.terminal import print_summary

__all__ = ["RunSummary", "print_summary", "summarize", "write_report"]
