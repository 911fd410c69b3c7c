"""The one way out of a site: the policy is asked, then the audit log is written.

Nothing is sent but what has passed here, except greetings ('hello', 'done'), which hold the
hash of the request that they answer and nothing of the site. The site's key lies in its own
work folder and is made on first use, unless somebody made it there before (``mutirao federate
keys``). Knows nothing of how parcels travel.

What a request leads to is described before the work (``describe_update``), checked
(``admit``), and checked again with its bytes before it leaves (``release``). Messages of secure
aggregation beside the masked update are checked as the update that they serve.

Not known here: the hash of the app bundle, because the transport does not prove it. A policy
that lists bundles, instead of "any", refuses every request.
"""

from __future__ import annotations

from functools import cached_property

from mutirao.federated.audit.log import LOG_NAME, AuditLog
from mutirao.federated.audit.record import ERROR_KIND, Mask, Noise, Release, Request
from mutirao.federated.identity import open_identity
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Plan, Site
from mutirao.federated.site.policy import LOSSES_KIND, SitePolicy, load_policy

IDENTITY_FOLDER = "identity"
UPDATE_KIND = "adapter update"
WEIGHTS_KIND = "weights update"
"""Kind of an update of all weights."""
CONTROL_KIND = "secure aggregation"
"""Kind of messages that serve a masked update: keys, shares, signatures."""
SECURE_CODEC = "fixed point"
_RUN_CHARACTERS = 16
_UNKNOWN_RUN = "unknown"


class Gate:
    """One site's way out; the policy's file is read anew for each of them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @cached_property
    def policy(self) -> SitePolicy | None:
        """The site's policy, read once; None where the site has none."""
        return load_policy(self.site.policy) if self.site.policy else None

    def describe_update(
        self, plan: Plan, asked: Parcel, *, mask: Mask | None = None, noise: Noise | None = None
    ) -> Request:
        """Return what a training request leads to.

        Args:
            plan: what was agreed.
            asked: the request; names run and round.
            mask: secure aggregation, where it is used.
            noise: differential privacy as it stands after the round, where it is used.
        """
        return Request(
            run=run_name(asked.run),
            round=asked.round,
            recipient=COORDINATOR,
            recipient_key=self.site.coordinator_key,
            recipe_sha256=plan.sha256,
            kind=UPDATE_KIND if plan.lora else WEIGHTS_KIND,
            content=_content(plan, self.site),
            codec=SECURE_CODEC if mask else plan.federated.upload.format,
            mask=mask,
            noise=noise,
        )

    def describe_losses(self, plan: Plan, asked: Parcel, label: str) -> Request:
        """Return what a request to evaluate leads to."""
        return Request(
            run=run_name(asked.run),
            round=asked.round,
            recipient=COORDINATOR,
            recipient_key=self.site.coordinator_key,
            recipe_sha256=plan.sha256,
            kind=LOSSES_KIND,
            content=f"loss of {label[:200]!r} on held-out text, and how many tokens it is of",
            codec="text",
        )

    def admit(self, request: Request) -> None:
        """Let work begin, or say why not.

        Raises:
            PolicyError: the site's policy does not allow what it would lead to.
            RecipeError: the policy's file is missing or wrong.
        """
        if self.policy is not None:
            self.policy.check(request)

    def release(
        self, request: Request, answer: Parcel, tensors: tuple[str, ...], *, control: str = ""
    ) -> None:
        """Write down that an answer is about to leave; it may when this has returned.

        Args:
            request: what it was described as.
            answer: the signed answer.
            tensors: names of the tensors in it, or of those that it serves.
            control: for a message that serves a masked update, what is in it.

        Raises:
            PolicyError: the site's policy does not allow it.
            AuditError: the log was altered or cut.
            DiskFullError: no room for the record.
        """
        policy = self.policy
        release = Release(
            **request.model_copy(update={"tensors": tensors}).model_dump(),
            payload_bytes=answer.num_bytes,
            payload_sha256=answer.sha256,
            policy_sha256=policy.sha256 if policy else None,
        )
        logged = release
        if control:
            changes = {"kind": CONTROL_KIND, "content": control, "tensors": ()}
            logged = release.model_copy(update=changes)
        if policy is None:
            self._log().append(logged)
        else:
            self._log().append(logged, check=lambda records: policy.check(release, records))

    def release_error(self, plan: Plan | None, answer: Parcel, sentence: str) -> None:
        """Write down that a sentence is about to leave in place of an answer.

        No policy is asked: a site must be able to say why it refuses.

        Raises:
            AuditError: the log was altered or cut.
            DiskFullError: no room for the record.
        """
        self._log().append(
            Release(
                run=run_name(answer.run),
                round=answer.round,
                recipient=COORDINATOR,
                recipient_key=self.site.coordinator_key,
                recipe_sha256=plan.sha256 if plan else None,
                kind=ERROR_KIND,
                content=sentence[:2_000],
                codec="text",
                payload_bytes=answer.num_bytes,
                payload_sha256=answer.sha256,
            )
        )

    def _log(self) -> AuditLog:
        key = open_identity(self.site.work / IDENTITY_FOLDER)
        return AuditLog(self.site.work / LOG_NAME, key, site=self.site.name)


def run_name(run: str) -> str:
    """Return what the log calls a run: the beginning of its id, which outlives restarts."""
    return run[:_RUN_CHARACTERS] or _UNKNOWN_RUN


def _content(plan: Plan, site: Site) -> str:
    if plan.lora is None:
        what = "change of all weights"
    else:
        layers = f"the last {plan.lora.num_layers} layers" if plan.lora.num_layers else "all layers"
        rank = site.rank or plan.lora.rank
        what = f"change of a LoRA adapter of rank {rank} on {layers}"
        what += ", B alone" if plan.lora.freeze_a else ""
    if plan.federated.privacy is not None:
        return f"{what}; epsilon spent so far"
    return f"{what}; training tokens, losses and seconds"
