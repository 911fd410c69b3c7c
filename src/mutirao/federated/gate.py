"""The one way out of a site: the policy is asked, then the audit log is written.

Nothing is sent but what has passed here. The site's key lies in its own work folder and is
made on first use, unless somebody made it there before (``mutirao federate keys``). Knows
nothing of how messages travel.

Not known here yet, because the transport does not prove it: the coordinator's key and the
hash of the app bundle. A policy that lists them, instead of "any", refuses every request.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from mutirao.artifact import canonical_json
from mutirao.federated.audit_log import LOG_NAME, AuditLog
from mutirao.federated.audit_record import ERROR_KIND, Release, Request
from mutirao.federated.identity import open_identity
from mutirao.federated.plan import Plan, Site
from mutirao.federated.policy import SitePolicy, load_policy

IDENTITY_FOLDER = "identity"
RECIPIENT = "coordinator"
UPDATE_KIND = "adapter update"
UPDATE_CODEC = "int8"
_RUN_CHARACTERS = 16
_UNKNOWN_RUN = "unknown"


@dataclass(frozen=True)
class Payload:
    """What is to leave, in numbers."""

    num_bytes: int
    """Its bytes."""
    sha256: str
    """Their hash."""


class Gate:
    """One site's way out, opened anew for each message."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @cached_property
    def policy(self) -> SitePolicy | None:
        """The site's policy, read once; None where the site has none."""
        return load_policy(self.site.policy) if self.site.policy else None

    def admit(self, plan: Plan, round_number: int) -> None:
        """Let the work of a round begin, or say why not.

        Raises:
            PolicyError: the site's policy does not allow what it would lead to.
            RecipeError: the policy's file is missing or wrong.
        """
        if self.policy is not None:
            self.policy.check(_describe(plan, round_number))

    def release_update(
        self, plan: Plan, round_number: int, tensors: tuple[str, ...], payload: Payload
    ) -> None:
        """Write down that an update is about to leave; it may when this has returned.

        Raises:
            PolicyError: the site's policy does not allow it.
            AuditError: the log was altered or cut.
            DiskFullError: no room for the record.
        """
        request = _describe(plan, round_number)
        request = request.model_copy(update={"tensors": tensors})
        if (policy := self.policy) is None:
            self._log().append(_release(request, payload))
            return
        release = _release(request, payload, policy.sha256)
        self._log().append(release, check=lambda records: policy.check(release, records))

    def release_error(
        self, plan: Plan | None, round_number: int | None, sentence: str, payload: Payload
    ) -> None:
        """Write down that a sentence is about to leave in place of an update.

        No policy is asked: a site must be able to say why it refuses.

        Raises:
            AuditError: the log was altered or cut.
            DiskFullError: no room for the record.
        """
        request = Request(
            run=run_name(plan),
            round=round_number,
            recipient=RECIPIENT,
            recipe_sha256=recipe_sha256(plan) if plan else None,
            kind=ERROR_KIND,
            content=sentence[:2_000],
            codec="text",
        )
        self._log().append(_release(request, payload))

    def _log(self) -> AuditLog:
        key = open_identity(self.site.work / IDENTITY_FOLDER)
        return AuditLog(self.site.work / LOG_NAME, key, site=self.site.name)


def recipe_sha256(plan: Plan) -> str:
    """Return the hash by which a policy allows a plan."""
    return hashlib.sha256(canonical_json(plan.model_dump(mode="json"))).hexdigest()


def run_name(plan: Plan | None) -> str:
    """Return what the log calls a run: a run that goes on after a crash keeps its name."""
    return recipe_sha256(plan)[:_RUN_CHARACTERS] if plan else _UNKNOWN_RUN


def _release(request: Request, payload: Payload, policy_sha256: str | None = None) -> Release:
    return Release(
        **request.model_dump(),
        payload_bytes=payload.num_bytes,
        payload_sha256=payload.sha256,
        policy_sha256=policy_sha256,
    )


def _describe(plan: Plan, round_number: int) -> Request:
    lora = plan.lora
    layers = f"the last {lora.num_layers} layers" if lora.num_layers else "all layers"
    return Request(
        run=run_name(plan),
        round=round_number,
        recipient=RECIPIENT,
        recipe_sha256=recipe_sha256(plan),
        kind=UPDATE_KIND,
        content=f"change of a LoRA adapter of rank {lora.rank} on {layers}"
        f"{', B alone' if lora.freeze_a else ''}; training tokens, losses and seconds",
        codec=UPDATE_CODEC,
    )
