"""Read rotary position embeddings from a model's own description.

config.json has written their parameters in two ways, before and since transformers 5; GGUF
metadata have a third. Frequencies themselves are computed in ``model_spec.rope_vectors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mutirao.inference.architecture.description_fields import (
    count,
    flag,
    number,
    refuse,
    unsupported,
)
from mutirao.inference.architecture.families import LAYER_TYPES, Family
from mutirao.inference.architecture.model_spec import RopeSpec


def config_rope(family: Family, fields: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Read RoPE from a config.json, written the old way (``rope_scaling``) or the new.

    Args:
        family: says whether there is any, and whether windowed layers have their own.
        fields: the config, with the family's defaults.
        head_dim: values of a head, all of which turn.

    Returns:
        ``rope`` and ``rope_local`` of ModelSpec.

    Raises:
        FormatError: a scaling that is not supported, or a number that is missing.
    """
    if "rope_theta" not in family.config_defaults:
        return {"rope": None, "rope_local": None}
    written = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    if not isinstance(written, Mapping) or not isinstance(scaling, Mapping):
        raise unsupported("rope_parameters", [written, scaling], ["fields by name"])
    if not family.has_local_rope:
        return {"rope": _rope(fields, "rope_theta", scaling or written, head_dim)}
    if written and not any(kind in written for kind in LAYER_TYPES):
        raise unsupported("rope_parameters", dict(written), ["fields by layer type"])
    everywhere, local = (written.get(kind) or {} for kind in LAYER_TYPES)
    if not isinstance(everywhere, Mapping) or not isinstance(local, Mapping):
        raise unsupported("rope_parameters", dict(written), ["fields by name in each layer type"])
    return {
        "rope": _rope(fields, "rope_theta", {**everywhere, **scaling}, head_dim),
        "rope_local": _rope(fields, "rope_local_base_freq", local, head_dim),
    }


def _rope(
    fields: Mapping[str, Any], theta_key: str, written: Mapping[str, Any], head_dim: int
) -> RopeSpec:
    """Read one set of RoPE parameters as config.json writes them."""
    refuse(written, {"partial_rotary_factor": (None, 1)})
    theta = number(written, "rope_theta", number(fields, theta_key))
    kind = written.get("rope_type", written.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=head_dim)
    if kind not in ("linear", "llama3", "yarn"):
        raise unsupported("rope_type", kind, ["default", "linear", "llama3", "yarn"])
    values: dict[str, Any] = {"scaling": kind, "factor": number(written, "factor")}
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        trained = count(written, key, count(fields, "max_position_embeddings"))
        values["original_context"] = count(fields, key, trained)
    if kind == "llama3":
        values |= {k: number(written, k) for k in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= _yarn(written, values["factor"])
    return RopeSpec(theta=theta, rotary_dim=head_dim, **values)


def _yarn(written: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Read what only YaRN has; its magnitude as transformers infers it where it is not given."""
    refuse(written, {"mscale": (None, 0), "mscale_all_dim": (None, 0)})
    return {
        "beta_fast": number(written, "beta_fast", 32.0),
        "beta_slow": number(written, "beta_slow", 1.0),
        "truncate": flag(written, "truncate", True),
        "magnitude": number(written, "attention_factor", _yarn_magnitude(factor)),
    }


def _yarn_magnitude(factor: float) -> float:
    """Return 0.1 ln(factor) + 1, the square root of 1/t in arXiv:2309.00071, equation 22."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def gguf_rope(
    family: Family, fields: Mapping[str, Any], head_dim: int, has_table: bool
) -> dict[str, Any]:
    """Read RoPE from GGUF metadata; see ``config_rope``.

    Args:
        family: says which pairs turn, and whether windowed layers have their own RoPE.
        fields: the metadata of the architecture, without its name.
        head_dim: values of a head; all of them turn unless the metadata say otherwise.
        has_table: the file holds factors for each frequency.
    """
    base: dict[str, Any] = {
        "rotary_dim": count(fields, "rope.dimension_count", head_dim),
        "interleaved": family.gguf_interleaved,
    }
    theta = number(fields, "rope.freq_base", family.config_defaults["rope_theta"])
    kind = fields.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn") or (has_table and kind != "none"):
        expected = ["none"] if has_table else ["none", "linear", "yarn"]
        raise unsupported("rope.scaling.type", kind, expected)
    values: dict[str, Any] = {"scaling": "table" if has_table else kind}
    if kind != "none":
        values["factor"] = number(fields, "rope.scaling.factor")
    if kind == "yarn":
        context = count(fields, "context_length")
        values["original_context"] = count(fields, "rope.scaling.original_context_length", context)
        values["beta_fast"] = number(fields, "rope.scaling.yarn_beta_fast", 32.0)
        values["beta_slow"] = number(fields, "rope.scaling.yarn_beta_slow", 1.0)
        values["magnitude"] = _yarn_magnitude(values["factor"])
    ropes = {"rope": RopeSpec(theta=theta, **base, **values)}
    if family.has_local_rope:
        local = family.config_defaults["rope_local_base_freq"]
        ropes["rope_local"] = RopeSpec(theta=number(fields, "rope.freq_base_swa", local), **base)
    return ropes
