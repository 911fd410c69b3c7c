"""Requests that are not carried out: why, and in which words the coordinator hears of it."""

from __future__ import annotations

import re

from mutirao.errors import FederationError, MutiraoError, PolicyError, PrivacyBudgetError
from mutirao.federated.messages import Reason
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Plan

_SPACE = re.compile(r"\s+")


class Refused(FederationError):
    """A request that is not carried out, and what the coordinator can do about it."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Reason = reason


def explain(site_name: str, error: Exception) -> tuple[Reason, str]:
    """Return reason and sentence; of an unexpected error nothing is told.

    Its text may quote the site's own, so that it stays in the site's log.
    """
    if not isinstance(error, MutiraoError):
        log = "its own log, log.jsonl in its work folder, says why"
        return "failed", f"site {site_name} failed; {log}"
    reason: Reason = "failed"
    if isinstance(error, Refused):
        reason = error.reason
    elif isinstance(error, PolicyError):
        reason = "policy"
    elif isinstance(error, PrivacyBudgetError):
        reason = "budget"
    return reason, f"site {site_name}: {_SPACE.sub(' ', str(error))}"


def plan_of(request: Parcel) -> Plan | None:
    """Return the plan in a request, or None where it has no readable one."""
    try:
        return Plan.model_validate(request.fields["plan"])
    except (KeyError, ValueError, RecursionError):
        return None
