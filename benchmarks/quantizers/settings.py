"""All settings of the table by their names: ours, and the peers' as ``peers`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mutirao.errors import InputError
from quantizers.ours import METHODS, OurSetting
from quantizers.peers import (
    BITS,
    GROUP_SIZES,
    LLAMA_CPP_FOLDED,
    LLAMA_CPP_TYPES,
    Setting,
    integer_settings,
)

AnySetting = OurSetting | Setting
LIGHT_ITERS = 50
"""AutoRound's steps per block in its recipe "light" (version 0.16); its default has 200."""
LIGHT_OPTIONS = {"more": {"lr": 5e-3}}
"""What else that recipe changes; otherwise the rate is one over the steps."""


def all_settings(iters: int) -> dict[str, AnySetting]:
    """Return every setting by its name; a name may have no comma.

    llama.cpp's types are settings of their own here, so that one can fail or be stopped alone.

    Args:
        iters: AutoRound's steps per block, which become part of its names.
    """
    ours = [
        OurSetting(name, bits, size) for bits in BITS for size in GROUP_SIZES for name in METHODS
    ]
    named: dict[str, AnySetting] = {each.name: each for each in ours}
    for each in integer_settings(iters=iters):
        if each.peer == "auto-round":
            more = LIGHT_OPTIONS if iters == LIGHT_ITERS else {}
            each = replace(each, suffix=f"iters{iters}", options={**each.options, **more})
        named[f"{each.peer}-{each.name}"] = each
    for types, options, suffix in (
        (LLAMA_CPP_TYPES, {}, ""),
        (LLAMA_CPP_FOLDED, {"fold": True}, "-folded"),
    ):
        for name in types:
            each = Setting(
                "llama.cpp", "llama.cpp", options={"types": [name], **options}, suffix=name + suffix
            )
            named[each.name] = each
    return named


def choose(wanted: Sequence[str], iters: int) -> dict[str, AnySetting]:
    """Return the settings of some names, or of patterns such as ``*-3-g32``; all for none.

    Any name ``ours-STEPS-BITS-gSIZE`` is one, with ``+`` between steps, listed or not.

    Raises:
        InputError: a name is of no setting.
    """
    known = all_settings(iters)
    chosen: dict[str, AnySetting] = {} if wanted else known
    for word in wanted:
        found = {name: each for name, each in known.items() if fnmatchcase(name, word)}
        own = OurSetting.parse(word)
        if not found and own is not None:
            found = {word: own}
        if not found:
            raise InputError(f"--only {word} is no setting (--list names them)")
        chosen |= found
    return chosen
