"""A federation shown to people: the coordinator's page, and a site's evidence sheet.

    folder      reads a coordinator's work folder
    measures    reads who brings what, where that was measured
    curves      figures by round
    page        the coordinator's page, and the same numbers in the terminal
    evidence    reads a site's audit log, policy and the results of attacks
    attacks     reads the results of the privacy attacks
    sheet       the evidence sheet, one A4 page for a data-protection officer
    sentences   every text of the sheet, in English and Portuguese

Both pages are made from files alone; no model is loaded and nothing is sent.
"""

from mutirao.report.federation.folder import FederationSummary, is_federation, read_federation
from mutirao.report.federation.page import print_federation, write_federation_report
from mutirao.report.federation.sheet import write_evidence

__all__ = [
    "FederationSummary",
    "is_federation",
    "print_federation",
    "read_federation",
    "write_evidence",
    "write_federation_report",
]
