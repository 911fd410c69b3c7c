"""One file with which a site joins: where the coordinator is, by what both know each other.

The coordinator writes one for each site, after the site has told its public key. It holds the
private key of the site's node, which says no more than that its holder may connect; who the
site is, only the site's own key can say. So it should reach the site unread, and is readable
by its owner alone; stolen, it lets a stranger connect, be told of, and be ignored.

The other sites' keys, which secure aggregation needs, are in it for convenience. A coordinator
that puts its own keys there could read what it should only see the sum of: compare them with
the other sites, which is why joining shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, model_validator

from mutirao.artifact import write_atomic
from mutirao.config import Config, load_json
from mutirao.errors import InputError
from mutirao.federated.flower.certificates import (
    Certificates,
    node_key_pem,
    node_public_pem,
    open_certificates,
    open_node_key,
    write_private,
)
from mutirao.federated.flower.connection import Connection
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.plan import Coordinator, Plan, Site
from mutirao.federated.recipe import FederationRecipe, open_plan

SUFFIX = ".invite"
NODES = "nodes"


class Invite(Config):
    """What a site has to know of its coordinator."""

    version: int = Field(default=1, ge=1, le=1)
    """Of this file."""
    site: str
    """Name of the invited site."""
    site_key: str
    """The site's public key as the coordinator knows it."""
    run_id: str
    """The run."""
    plan_sha256: str
    """Hash of what is agreed, for the site's policy."""
    plan: Plan | None = None
    """What is agreed, to be read before a policy allows it; null in invites of old."""
    coordinator_key: str
    """Public key of the coordinator, which signs all requests."""
    identities: dict[str, str]
    """Public key of each site, by name."""
    connection: Connection
    """Where the coordinator is, its certificate authority and the node's key."""

    @model_validator(mode="after")
    def _check_plan(self) -> Invite:
        if self.plan is not None and self.plan.sha256 != self.plan_sha256:
            raise ValueError("plan and plan_sha256 do not belong together")
        return self


def open_run(recipe: FederationRecipe) -> tuple[Plan, Coordinator, Certificates | None]:
    """Return plan, coordinator and certificates of a recipe, made on first use.

    Raises:
        InputError: the work folder belongs to another recipe, or certificates are missing.
    """
    from mutirao.federated.coordinator.journal import keep_coordinator

    certificates = open_certificates(recipe.certificates) if recipe.certificates else None
    plan = open_plan(recipe)
    coordinator = keep_coordinator(plan, recipe.public_keys(), recipe.coordinator_folder)
    return plan, coordinator, certificates


def write_invites(recipe: FederationRecipe, folder: Path) -> list[Path]:
    """Write an invite for each site.

    Invites that are there already are left as they are; the node key of a site whose invite is
    written anew takes the place of the old one, whose invite no longer works.

    Returns:
        The paths of all invites.
    """
    plan, coordinator, certificates = open_run(recipe)
    key = public_hex(open_identity(coordinator.work / "identity"))
    paths = []
    for name, site_key in sorted(coordinator.sites.items()):
        path = folder / f"{name}{SUFFIX}"
        paths.append(path)
        if path.exists():
            continue
        invite = Invite(
            site=name,
            site_key=site_key,
            run_id=coordinator.run_id,
            plan_sha256=plan.sha256,
            plan=plan,
            coordinator_key=key,
            identities=dict(coordinator.sites),
            connection=Connection(
                address=f"{recipe.address}:{recipe.port}",
                ca_certificate=certificates.ca.read_text() if certificates else None,
                node_key=_make_node_key(recipe, name) if certificates else None,
            ),
        )
        write_private(path, invite.model_dump_json(indent=1).encode())
    return paths


def node_keys(recipe: FederationRecipe) -> list[bytes]:
    """Return the public keys of the nodes that were invited, in PEM.

    Raises:
        InputError: somebody was not invited yet.
    """
    keys = []
    for name in sorted(recipe.sites):
        path = recipe.work / NODES / f"{name}.pem"
        if not path.exists():
            raise InputError(
                f"site {name} has no invite yet; `mutirao federate invite` writes them"
            )
        keys.append(path.read_bytes())
    return keys


def read_invite(path: Path) -> Invite:
    """Read an invite.

    Raises:
        InputError: it cannot be read, or is none.
    """
    return load_json(Invite, path)


def check_invited(invite: Invite, work: Path, policy: Path | None = None) -> None:
    """Check, before anything is done, that an invite is for this site; read its policy.

    Raises:
        InputError: the site's key is not the one that the coordinator knows.
        RecipeError: the policy's file is missing or wrong.
    """
    from mutirao.federated.site.policy import load_policy

    key = public_hex(open_identity(work / "identity"))
    if key != invite.site_key:
        raise InputError(
            f"the key in {work / 'identity'} is {key}, but the invite is for {invite.site_key}; "
            "name the work folder that has that key, or tell the coordinator this one"
        )
    if policy is not None:
        load_policy(policy)


def join(
    invite: Invite,
    *,
    model: Path,
    data: Path,
    work: Path,
    policy: Path | None = None,
    on_ready: Callable[[Site], None] | None = None,
) -> None:
    """Serve the coordinator of an invite until told to stop.

    Args:
        invite: whose invite.
        model: the base model, an artifact of kind 'model'.
        data: the site's data: an artifact of kind 'data', or a folder of text.
        work: where the site keeps its key, its journal and its logs.
        policy: the site's policy file.
        on_ready: called with the site's own file before it connects.

    Raises:
        InputError: the site's key is not the one that the coordinator knows.
        FederationError: connecting makes no sense; one sentence says why.
    """
    from mutirao.data.config import DataConfig
    from mutirao.federated.flower.site_agent import open_worker, run_site
    from mutirao.federated.recipe import open_data, open_model

    check_invited(invite, work, policy)
    site = Site(
        name=invite.site,
        model=open_model(model, work),
        data=open_data(invite.site, data, work, DataConfig()),
        work=work.resolve(),
        policy=policy.resolve() if policy else None,
        coordinator_key=invite.coordinator_key,
        identities=invite.identities,
    )
    if on_ready is not None:
        on_ready(site)
    with open_worker(site) as worker:
        run_site(site, invite.connection, worker=worker)


def _make_node_key(recipe: FederationRecipe, name: str) -> str:
    """Make a node key; the coordinator keeps its public part alone."""
    path = recipe.work / NODES / f".{name}.key"
    path.unlink(missing_ok=True)
    try:
        key = open_node_key(path)
    finally:
        path.unlink(missing_ok=True)
    write_atomic(recipe.work / NODES / f"{name}.pem", node_public_pem(key))
    return node_key_pem(key)
