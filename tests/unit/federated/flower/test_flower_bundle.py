"""The app bundle: the same bytes everywhere, read by Flower, with nothing to execute."""

from __future__ import annotations

import io
import zipfile

from flwr.common.config import get_fab_config, validate_config

from mutirao.federated.flower.bundle import build_bundle, bundle_sha256


def test_the_bundle_is_the_same_on_every_machine():
    # Change it with PARCEL_VERSION only: policies of sites list this hash.
    assert bundle_sha256() == "a3e873164094eac1d517542dd400cff04ffc5a9bb7693482dec8ca1e578f7423"


def test_flower_accepts_the_bundle_and_it_holds_no_code():
    config = get_fab_config(build_bundle())
    is_valid, errors, _ = validate_config(config, check_module=False)
    assert is_valid, errors
    names = zipfile.ZipFile(io.BytesIO(build_bundle())).namelist()
    assert names == ["pyproject.toml", ".info/CONTENT"]
    assert config["project"]["dependencies"] == []
