"""How few bits does this model bear: measured, foretold, weighed and decided, in one call."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mutirao.advise.checkpoint_law import fit_checkpoint
from mutirao.advise.choosing import Z_95, Candidate, choose, explain, list_candidates, mark_pareto
from mutirao.advise.config import AdviseConfig, Budget, Outlook
from mutirao.advise.findings import Advice
from mutirao.advise.kept import KeptLines
from mutirao.advise.layers import Found, Mix, Part, mix_bits, probe_parts
from mutirao.advise.measuring import Bench, Measured, fingerprint, measure_ways
from mutirao.advise.noises import Noises
from mutirao.advise.prospects import look_ahead
from mutirao.advise.speeds import predict_speeds
from mutirao.advise.ways import Shape, Way
from mutirao.artifact import MANIFEST_NAME, open_artifact, write_artifact
from mutirao.compress.compression import coarse_weights, refuse_quantized
from mutirao.compress.config import SUPPORTED_BITS, TUNE, TextConfig
from mutirao.compress.steps import check_finite
from mutirao.compress.training.following import import_optional
from mutirao.compress.windows import Windows, read_windows
from mutirao.console import step_progress, track
from mutirao.environment import cache_directory
from mutirao.errors import DataError, ShapeError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.causal import CausalModel

logger = logging.getLogger(__name__)

FILE_NAME = "advice.json"
KIND = "advice"


def advise(
    path: Path,
    text: Path,
    *,
    config: AdviseConfig | None = None,
    budget: Budget | None = None,
    outlook: Outlook | None = None,
    out: Path | None = None,
) -> Advice:
    """Say how few bits a model bears.

    Measures, probes and noises are kept in the cache, so that a second advice on the same model,
    text and windows starts from them, as one that was interrupted does.

    Args:
        path: model artifact, or any Hugging Face directory, not quantized.
        text: a folder or a file of text like what the model is for.
        config: what to measure and to choose from.
        budget: what the model must keep to.
        outlook: what is known of the model's training and use.
        out: folder of an artifact of kind 'advice' with ``advice.json``; None: nothing is written.

    Raises:
        InputError: the model is quantized, nothing keeps to the budget, or a package that a
            method needs is not installed.
        DataError: there is too little text, for the windows or for the interval that was asked for,
            or weights are not finite.
        FormatError: ``path`` is no model, or of a kind that is not supported.
        ShapeError: none of the group sizes divides all inputs.
        DiskFullError: no room for what is written.
    """
    config, budget, outlook = config or AdviseConfig(), budget or Budget(), outlook or Outlook()
    refuse_quantized(path)
    if any(TUNE in method for method in config.methods):
        import_optional("teacher_trainer", "TRL")
    is_artifact = (path / MANIFEST_NAME).is_file()
    if is_artifact:
        open_artifact(path, "model")
    model, tokenizer = load_causal_lm(path, dtype=fast_dtype())
    check_finite(model)
    encoder = CausalModel(model, tokenizer, name=path.name)
    windows = read_windows(text, encoder, config.text)
    bench = Bench(model, windows)
    coarse = coarse_weights(bench.layers)
    if coarse is not None:
        logger.warning(coarse)
    shape = Shape.of(model, bench.layers)
    group_sizes = _dividing(shape, config.group_sizes)
    first = Way("rtn", 4, group_sizes[0])
    if config.half_width is not None:
        windows = _enough(bench, first, path, text, encoder, config)
        bench = Bench(model, windows)
    found = _find_kept(path, windows)
    measured = _measure(bench, found.ways, _measured_ways(config, group_sizes))
    ways = [
        Way(method, bits, size)
        for method in config.methods
        for bits in SUPPORTED_BITS
        for size in group_sizes
    ]
    wanted = dict.fromkeys((*ways, *(each.way for each in measured)))
    by_grid = Noises(bench.layers, KeptLines(_kept_path(fingerprint(path), "noises")))
    noises = _noises(by_grid, tuple(wanted))
    law = fit_checkpoint(measured, noises)
    speeds = predict_speeds(path, budget.memory_bytes)
    loss = measured[0].loss.original
    candidates = [
        replace(each, speed=speeds.get(each.way.bits))
        for each in mark_pareto(list_candidates(shape, law, ways, noises, measured))
    ]
    chosen = choose(candidates, budget, loss)
    parts, mix = _layers(bench, shape, chosen, config, by_grid, found)
    advice = Advice(
        model=path.name,
        loss=loss,
        num_weights=shape.num_weights,
        num_rounded=shape.num_rounded,
        original_bytes=shape.original_bytes,
        num_tokens=measured[0].loss.num_tokens,
        budget=budget,
        law=law,
        candidates=tuple(candidates),
        chosen=chosen,
        sentence=explain(chosen, candidates, budget, loss),
        parts=parts,
        mix=mix,
        prospects=look_ahead(chosen, shape.num_rounded, outlook),
        coarse=coarse,
        other_measured=tuple((each, noises[each.way]) for each in measured if each.way not in ways),
    )
    if out is not None:
        recipe = {
            "advise": config.model_dump(mode="json"),
            "budget": budget.model_dump(mode="json"),
            "outlook": outlook.model_dump(mode="json"),
        }
        with write_artifact(out, KIND, recipe=recipe) as writer:
            if is_artifact:
                writer.add_parent("model", path)
            content = json.dumps(advice.to_json(), indent=1)
            (writer.path / FILE_NAME).write_text(content, encoding="utf-8")
    return advice


def _dividing(shape: Shape, group_sizes: Sequence[int]) -> list[int]:
    found = [size for size in sorted(set(group_sizes)) if shape.divides(size)]
    if not found:
        raise ShapeError(
            f"none of the group sizes {', '.join(map(str, group_sizes))} divides every layer's "
            "inputs; name a divisor such as 16 or 32 with --group-sizes"
        )
    return found


def _measured_ways(config: AdviseConfig, group_sizes: Sequence[int]) -> list[Way]:
    """Return what is measured: rounding to nearest over all bits, other methods where they help."""
    smallest = group_sizes[0]
    found = [
        Way("rtn", bits, size) for size in (smallest, None) for bits in sorted(config.measured_bits)
    ]
    for method in config.methods:
        if method != "rtn":
            found += [Way(method, bits, smallest) for bits in sorted(config.better_bits)]
    return found


def _enough(
    bench: Bench, way: Way, path: Path, text: Path, encoder: CausalModel, config: AdviseConfig
) -> Windows:
    """Return as many windows as the interval takes that was asked for, by a first measure.

    Raises:
        DataError: there is too little text for them; the message says how much is needed.
    """
    assert config.half_width is not None
    first = _measure(bench, _find_kept(path, bench.windows).ways, [way])[0].loss
    half = Z_95 * first.standard_error / first.original
    needed = math.ceil(config.text.heldout_windows * (half / config.half_width) ** 2)
    if needed <= config.text.heldout_windows:
        return bench.windows
    settings: TextConfig = config.text.model_copy(update={"heldout_windows": needed})
    try:
        return read_windows(text, encoder, settings)
    except DataError as error:
        raise DataError(
            f"an interval of ± {config.half_width:.2%} of the loss takes about {needed:,} held-out "
            f"windows ({config.text.heldout_windows} give ± {half:.2%}): {error}"
        ) from None


def _kept_path(key: str, what: str | None = None) -> Path:
    return cache_directory() / "advise" / ".".join(filter(None, (key, what, "jsonl")))


def _find_kept(path: Path, windows: Windows) -> Found:
    """Return where is kept what was found of a model on some windows."""
    key = fingerprint(path, windows)
    parts, mixes = (KeptLines(_kept_path(key, what)) for what in ("parts", "mixes"))
    return Found(_kept_path(key), parts, mixes)


def _measure(bench: Bench, kept: Path, ways: Sequence[Way]) -> list[Measured]:
    found = []
    with step_progress() as progress:
        bar = progress.add_task("measuring", total=len(ways))
        for each in measure_ways(bench, ways, kept):
            found.append(each)
            progress.update(bar, advance=1, description=f"measured {each.way}")
    return found


def _noises(noises: Noises, ways: Sequence[Way]) -> dict[Way, float]:
    """Return the noise of each way; it is of the grid, whatever the method."""
    grids = list(dict.fromkeys((way.bits, way.group_size) for way in ways))
    by_grid = {
        (bits, size): noises.find(bits, size)
        for bits, size in track(grids, "rounding every layer", len(grids))
    }
    return {way: by_grid[way.bits, way.group_size] for way in ways}


def _layers(
    bench: Bench,
    shape: Shape,
    chosen: Candidate,
    config: AdviseConfig,
    noises: Noises,
    found: Found,
) -> tuple[tuple[Part, ...], Mix | None]:
    if not config.sensitivity_windows:
        return (), None
    size = chosen.way.group_size
    assert size is not None
    num_parts = len({name.rpartition(".")[0] for name in bench.layers})
    parts = tuple(
        track(
            probe_parts(bench, size, config.sensitivity_windows, found.parts),
            "rounding part by part",
            num_parts,
        )
    )
    if chosen.way.bits in (min(SUPPORTED_BITS), max(SUPPORTED_BITS)):
        return parts, None  # nothing to move from one part to another
    uniform = Way("rtn", chosen.way.bits, size)
    return parts, mix_bits(bench, shape, list(parts), uniform, noises, found)
