"""The app bundle that Flower wants for a run: it names the coordinator's app, and has no code.

Flower hands bundles to sites to be unpacked and imported there. Our sites never download
one; they look at its hash alone, and answer only where it is the bundle that their own wheel
would build, or one that their policy lists. So the bundle must be the same bytes everywhere:
it is written here, uncompressed and with fixed dates, because compressed bytes differ between
builds of zlib. Its version is that of our parcels: wheels that understand each other agree.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache

from mutirao.federated.parcel import PARCEL_VERSION

_APP = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mutirao-federation"
version = "{PARCEL_VERSION}.0.0"
description = "Names the coordinator's app, which is installed there; carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "mutirao"

[tool.flwr.app.components]
serverapp = "mutirao.federated.flower.server_app:app"
clientapp = "mutirao.federated.flower.server_app:no_client_app"

[tool.flwr.app.config]
"""
_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_MODE = 0o100644 << 16


@cache
def build_bundle() -> bytes:
    """Return the bundle: a zip archive of a project file and Flower's list of contents."""
    app = _APP.encode()
    listing = f"pyproject.toml,{hashlib.sha256(app).hexdigest()},{len(app) * 8}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("pyproject.toml", app), (".info/CONTENT", listing.encode())):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = _UNIX, _MODE
            archive.writestr(entry, content)
    return buffer.getvalue()


@cache
def bundle_sha256() -> str:
    """Return the bundle's hash, by which Flower names it and a policy allows it."""
    return hashlib.sha256(build_bundle()).hexdigest()
