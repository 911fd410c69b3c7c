"""A site's own policy: what may be asked of it and what may leave it, in one TOML file.

The officer of the site writes and keeps it; no coordinator can. A request is checked before
the work, and once more with its bytes before they leave. What has left so far is counted from
the audit log, so a restart resets nothing. The hash of the file stands in every record.

Lists of hashes and keys may be ``["any"]``, and protections may be left out; each such gap is
logged as a warning whenever the file is read. Not here: who may change the file (that is the
file system's), and any look into the content of an update.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field, field_validator

from mutirao.config import Config, parse_recipe
from mutirao.errors import PolicyError, RecipeError
from mutirao.federated.audit.check import total_bytes
from mutirao.federated.audit.record import ERROR_KIND, AuditRecord, Release, Request

ANY = "any"
LOSSES_KIND = "losses"
"""Kind of a message that holds nothing but how well somebody's model does on this site's text."""
_HEX = re.compile(r"[0-9a-f]{64}")
_SHOWN = 8
"""Allowed values that a refusal lists before it says how many more there are."""

logger = logging.getLogger(__name__)


class PrivacyRules(Config):
    """Differential privacy that a site insists on."""

    max_epsilon: float = Field(gt=0, allow_inf_nan=False)
    """The most that a run may have spent when a round of it leaves."""
    max_noise_free_rounds: int = Field(default=0, ge=0)
    """Rounds of a run that may leave without noise."""


class PolicyRules(Config):
    """What a site allows; whatever it does not name is refused."""

    recipes: tuple[str, ...]
    """Hashes of the plans that may be trained, or ["any"]."""
    app_bundles: tuple[str, ...]
    """Hashes of the app bundles that may ask, or ["any"]."""
    coordinators: tuple[str, ...]
    """Public keys of who may receive updates, or ["any"]."""
    kinds: tuple[str, ...]
    """Kinds of message that may leave, such as "adapter update", "weights update", "losses"."""
    codecs: tuple[str, ...]
    """Encodings in which they may leave, such as "int8"."""
    tensors: tuple[str, ...]
    """Patterns of tensor names (* ? [abc]), all names of an update must match one; ["*"] for
    all."""
    max_bytes_per_day: int = Field(ge=0)
    """The most that may leave in a day (UTC), over all runs, in bytes."""
    max_bytes_per_run: int = Field(ge=0)
    """The most that may leave in a run, in bytes."""
    min_cohort: int = Field(default=0, ge=0)
    """Secure aggregation over at least so many sites; 0 lets updates leave in clear."""
    differential_privacy: PrivacyRules | None = None
    """Differential privacy; left out, updates may leave without noise."""

    @field_validator("recipes", "app_bundles", "coordinators")
    @classmethod
    def _check_hashes(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if values == (ANY,):
            return values
        for value in values:
            if not _HEX.fullmatch(value):
                raise ValueError(
                    f'{value!r} is not accepted (expected 64 hexadecimal digits, or ["any"] alone)'
                )
        return values

    @field_validator("min_cohort")
    @classmethod
    def _check_cohort(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a cohort of 1 hides nothing (expected 0, or 2 and more)")
        return value

    def gaps(self) -> list[str]:
        """Return in words what this policy leaves open."""
        opened = {
            "trains any recipe": self.recipes == (ANY,),
            "runs any app bundle": self.app_bundles == (ANY,),
            "sends to any coordinator": self.coordinators == (ANY,),
            "lets tensors of any name leave": "*" in self.tensors,
            "lets updates leave in clear, without secure aggregation": self.min_cohort == 0,
            "lets updates leave without differential privacy": self.differential_privacy is None,
        }
        return [what for what, is_open in opened.items() if is_open]


@dataclass(frozen=True)
class SitePolicy:
    """The rules of a site, and the file that they are in."""

    rules: PolicyRules
    path: Path
    sha256: str
    """Hash of the file's bytes."""

    def check(self, request: Request, records: Sequence[AuditRecord] = ()) -> None:
        """Let a request or a release pass, or say why not.

        Args:
            request: what was asked; a Release is checked for its tensors and bytes, too.
            records: the site's verified audit log.

        Raises:
            PolicyError: it is not allowed; one sentence with what was asked, what is allowed
                and the policy's file.
        """
        rules = self.rules
        self._check_listed("recipe", request.recipe_sha256, rules.recipes)
        self._check_listed("app bundle", request.bundle_sha256, rules.app_bundles)
        self._check_listed("coordinator's key", request.recipient_key, rules.coordinators)
        self._check_named("kind of message", request.kind, rules.kinds)
        if request.kind != LOSSES_KIND:  # holds no tensor, so there is no codec and no sum
            self._check_named("codec", request.codec, rules.codecs)
            self._check_tensors(request)
            self._check_cohort(request)
        self._check_privacy(request, records)
        if isinstance(request, Release):
            self._check_bytes(request, records)

    def _refuse(self, asked: str, allowed: str) -> NoReturn:
        raise PolicyError(f"{asked}, but the site's policy {self.path} allows {allowed}")

    def _check_listed(self, what: str, value: str | None, allowed: tuple[str, ...]) -> None:
        """Check a hash or a key; one that is not known is on no list."""
        if allowed != (ANY,) and (value is None or value not in allowed):
            asked = f"{what} {value}" if value else f"an unknown {what}"
            self._refuse(f"{asked} came with the request", _list(allowed))

    def _check_named(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            self._refuse(f"{what} {value!r} was asked for", _list(allowed))

    def _check_tensors(self, request: Request) -> None:
        patterns = self.rules.tensors
        if isinstance(request, Release) and not request.tensors and "*" not in patterns:
            self._refuse("an update that does not name its tensors was to leave", _list(patterns))
        for name in request.tensors:
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                self._refuse(f"tensor {name[:200]!r} was asked for", _list(patterns))

    def _check_cohort(self, request: Request) -> None:
        least = self.rules.min_cohort
        size = request.mask.cohort_size if request.mask else 0
        if size < least:
            asked = f"secure aggregation over {size} sites" if size else "an update in clear"
            self._refuse(f"{asked} was asked for", f"only sums over at least {least} sites")

    def _check_privacy(self, request: Request, records: Sequence[AuditRecord]) -> None:
        privacy = self.rules.differential_privacy
        if privacy is None:
            return
        if request.noise is None or request.noise.noise_multiplier == 0:
            rounds = _noise_free_rounds(request.run, records) | {request.round}
            if len(rounds) > privacy.max_noise_free_rounds:
                self._refuse(
                    f"round {request.round} was asked for without noise",
                    f"{privacy.max_noise_free_rounds} such rounds in a run",
                )
        elif request.noise.epsilon > privacy.max_epsilon:
            self._refuse(
                f"an update with epsilon {request.noise.epsilon:g} was asked for",
                f"at most {privacy.max_epsilon:g}",
            )

    def _check_bytes(self, release: Release, records: Sequence[AuditRecord]) -> None:
        totals = total_bytes(records)
        today = time.strftime("%Y-%m-%d", time.gmtime())
        for left, most, period in (
            (totals.per_day.get(today, 0), self.rules.max_bytes_per_day, "day (UTC)"),
            (totals.per_run.get(release.run, 0), self.rules.max_bytes_per_run, "run"),
        ):
            if left + release.payload_bytes > most:
                self._refuse(
                    f"an update of {release.payload_bytes} bytes was to leave after {left} in the "
                    f"same {period}",
                    f"{most} bytes a {period}",
                )


def load_policy(path: Path) -> SitePolicy:
    """Read a site's policy, and log a warning for each thing that it leaves open.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown, a value is bad.
    """
    try:
        content = path.read_bytes()
        document: dict[str, Any] = tomllib.loads(content.decode())
    except OSError as error:
        raise RecipeError(f"policy {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"policy {path} is not valid TOML: {error}") from None
    rules = parse_recipe(PolicyRules, document, origin=f"policy {path}")
    for gap in rules.gaps():
        logger.warning("the site's policy %s %s", path, gap)
    return SitePolicy(rules, path, hashlib.sha256(content).hexdigest())


def _noise_free_rounds(run: str, records: Sequence[AuditRecord]) -> set[int | None]:
    """Return the rounds of a run of which an update left without noise."""
    releases = (record.entry for record in records if isinstance(record.entry, Release))
    return {
        release.round
        for release in releases
        if release.run == run
        and release.kind != ERROR_KIND
        and (release.noise is None or release.noise.noise_multiplier == 0)
    }


def _list(values: tuple[str, ...]) -> str:
    """Return allowed values for a sentence."""
    if not values:
        return "none"
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return "only " + ", ".join(values[:_SHOWN]) + more
