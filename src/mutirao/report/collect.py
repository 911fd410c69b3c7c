"""Reads a run's folder into a summary: pairs losses, adds up bytes, notes what is missing.

Evaluations are opened through ``evaluate``, which checks them against their manifests; the
other files through ``documents``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from mutirao.artifact import Manifest
from mutirao.errors import DataError
from mutirao.evaluate.evaluation import Evaluation, read_evaluation
from mutirao.evaluate.losses import Difference, paired_difference
from mutirao.report.documents import (
    Preparation,
    Round,
    artifacts_in,
    check_is_run,
    find_manifest,
    read_answer,
    read_preparations,
    read_recipe,
    read_rounds,
    read_stages,
)
from mutirao.report.pedigree import trace
from mutirao.report.summary import (
    ALONE,
    BASE,
    FEDERATED,
    Baseline,
    Comparison,
    Compression,
    LossRow,
    RunSummary,
    Traffic,
    is_clear,
    mean_over_silos,
)


def summarize(run: Path) -> RunSummary:
    """Read a run's folder, whole or partial.

    Args:
        run: the folder.

    Raises:
        InputError: the folder is no run.
        ArtifactError: a file of the run is damaged or was altered.
    """
    check_is_run(run)
    evaluations = {
        label: read_evaluation(path) for label, path in artifacts_in(run / "evaluation").items()
    }
    preparations, rounds = read_preparations(run), read_rounds(run)
    silos = _silo_names(preparations, rounds, evaluations)
    labels = (*(f"{ALONE}{name}" for name in silos), FEDERATED)
    stale: list[str] = []
    losses = _loss_rows(silos, labels, evaluations, stale)
    silo_manifest = find_manifest(run / "silos")
    return RunSummary(
        run=str(run),
        finished_at=_newest(run),
        baseline=_baseline(find_manifest(run / "model")),
        silos=silos,
        stages=read_stages(run),
        preparations=preparations,
        rounds=rounds,
        model_labels=labels,
        losses=losses,
        federated_loss=_loss_by_silo(evaluations.get(FEDERATED)),
        mean_difference=mean_over_silos([row.differences[FEDERATED] for row in losses]),
        questions=_compare(silos, evaluations, "questions"),
        outcomes=_compare(silos, evaluations, "outcomes"),
        synthetic_patients=bool(silo_manifest and silo_manifest.recipe.get("synthetic_patients")),
        ceilings=_ceilings(silo_manifest),
        traffic=_traffic(silos, rounds, preparations),
        compressions=_compressions(run, silos, evaluations, stale),
        answer=read_answer(run),
        lineage=trace(_final_artifact(run)),
        recipe=read_recipe(run),
        missing=(*_missing(run, labels, preparations, evaluations), *stale),
    )


def find_best(silo: str, evaluations: Mapping[str, Evaluation]) -> str | None:
    """Return the label with the lowest loss, if it beats the next one beyond uncertainty."""
    texts = {
        label: evaluation.silos[silo].text
        for label, evaluation in evaluations.items()
        if silo in evaluation.silos
    }
    if len(texts) < 2:
        return None
    first, second = sorted(texts, key=lambda label: texts[label].loss)[:2]
    try:
        return first if is_clear(paired_difference(texts[first], texts[second])) else None
    except DataError:
        return None


def _silo_names(
    preparations: Mapping[str, Preparation],
    rounds: Sequence[Round],
    evaluations: Mapping[str, Evaluation],
) -> tuple[str, ...]:
    names = set(preparations)
    names.update(name for each in rounds for name in each.sites)
    names.update(name for each in evaluations.values() for name in each.silos)
    return tuple(sorted(names))


def _loss_rows(
    silos: Sequence[str],
    labels: Sequence[str],
    evaluations: Mapping[str, Evaluation],
    stale: list[str],
) -> tuple[LossRow, ...]:
    base = evaluations.get(BASE)
    if base is None:
        return ()
    compared = {label: evaluations[label] for label in (BASE, *labels) if label in evaluations}
    rows = []
    for silo in silos:
        if silo not in base.silos:
            continue
        text = base.silos[silo].text
        rows.append(
            LossRow(
                silo=silo,
                base_loss=text.loss,
                num_tokens=text.num_tokens,
                num_records=len(text.record_tokens),
                differences={
                    label: _difference(evaluations, label, BASE, silo, stale) for label in labels
                },
                best=find_best(silo, compared),
            )
        )
    return tuple(rows)


def _difference(
    evaluations: Mapping[str, Evaluation], first: str, second: str, silo: str, stale: list[str]
) -> Difference | None:
    """Difference of two models at a silo; what cannot be paired is noted in ``stale``."""
    sides = [evaluations.get(label) for label in (first, second)]
    texts = [side.silos[silo].text for side in sides if side is not None and silo in side.silos]
    if len(texts) < 2:
        return None
    try:
        return paired_difference(*texts)
    except DataError:
        stale.append(f"{first} on {silo}: measured on other records than {second}, not compared")
        return None


def _loss_by_silo(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    return {name: silo.text.loss for name, silo in evaluation.silos.items()}


def _compare(
    silos: Sequence[str], evaluations: Mapping[str, Evaluation], task: str
) -> tuple[Comparison, ...]:
    def result(label: str, silo: str) -> Any:
        evaluation = evaluations.get(label)
        if evaluation is None or silo not in evaluation.silos:
            return None
        return getattr(evaluation.silos[silo], task)

    rows = [Comparison(silo, result(BASE, silo), result(FEDERATED, silo)) for silo in silos]
    return tuple(row for row in rows if row.before is not None or row.after is not None)


def _traffic(
    silos: Sequence[str], rounds: Sequence[Round], preparations: Mapping[str, Preparation]
) -> dict[str, Traffic]:
    result = {}
    for silo in silos:
        entries = [each.sites[silo] for each in rounds if silo in each.sites]
        if entries:
            result[silo] = Traffic(
                bytes_sent=sum(entry.bytes_sent for entry in entries),
                bytes_received=sum(entry.bytes_received for entry in entries),
                bytes_stayed=(preparations[silo].num_bytes_kept if silo in preparations else None),
            )
    return result


def _compressions(
    run: Path, silos: Sequence[str], evaluations: Mapping[str, Evaluation], stale: list[str]
) -> tuple[Compression, ...]:
    rows = []
    for label, folder in artifacts_in(run / "compressed").items():
        manifest = find_manifest(folder)
        metrics = manifest.metrics if manifest is not None else {}
        differences = {
            silo: _difference(evaluations, label, FEDERATED, silo, stale) for silo in silos
        }
        rows.append(
            Compression(
                label=label,
                weight_bits=_number(metrics, "weight_bits"),
                bits_per_weight=_number(metrics, "bits_per_weight"),
                total_bytes=int(_number(metrics, "total_bytes")),
                original_bytes=int(_number(metrics, "original_bytes")),
                differences=differences,
                mean=mean_over_silos(list(differences.values())),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.weight_bits))


def _number(metrics: Mapping[str, JsonValue], name: str) -> float:
    value = metrics.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _baseline(manifest: Manifest | None) -> Baseline | None:
    if manifest is None:
        return None
    recipe = manifest.recipe
    quantization, num_parameters = recipe.get("source_quantization"), recipe.get("num_parameters")
    return Baseline(
        source=str(recipe.get("source", "unknown source")),
        quantization=str(quantization) if quantization else None,
        num_parameters=num_parameters if isinstance(num_parameters, int) else None,
    )


def _ceilings(manifest: Manifest | None) -> dict[str, float]:
    """Read ``bayes_auroc`` per silo, in either of the two forms a manifest may have."""
    if manifest is None:
        return {}
    direct = manifest.metrics.get("bayes_auroc")
    pairs: dict[str, JsonValue] = dict(direct) if isinstance(direct, dict) else {}
    for name, entry in manifest.metrics.items():
        if isinstance(entry, dict) and "bayes_auroc" in entry:
            pairs[name] = entry["bayes_auroc"]
    return {name: float(value) for name, value in pairs.items() if isinstance(value, int | float)}


def _final_artifact(run: Path) -> Path | None:
    """The last thing that was made: a compressed model, else the merged one, else earlier."""
    compressed = artifacts_in(run / "compressed")
    four = [path for label, path in compressed.items() if label.endswith("4-bit")]
    later = [*four, *compressed.values()][:1]
    candidates = [*later, run / "merged", run / "federated", run / "model"]
    return next((path for path in candidates if find_manifest(path) is not None), None)


def _newest(run: Path) -> str | None:
    folders = [run / name for name in ("model", "silos", "federated", "merged", "answer")]
    folders += [*artifacts_in(run / "evaluation").values(), *artifacts_in(run / "data").values()]
    manifests = [find_manifest(folder) for folder in folders]
    return max((each.created_at for each in manifests if each is not None), default=None)


def _missing(
    run: Path,
    labels: Sequence[str],
    preparations: Mapping[str, Preparation],
    evaluations: Mapping[str, Evaluation],
) -> list[str]:
    checks = [
        ((run / "stages.json").exists(), "time and memory of the stages (stages.json)"),
        (find_manifest(run / "model") is not None, "the base model (model)"),
        (bool(preparations), "the silos' prepared text (data)"),
        (BASE in evaluations, "the base model's measurements (evaluation/base)"),
        (find_manifest(run / "federated") is not None, "the federated adapter (federated)"),
        *(
            (label in evaluations, f"measurements of {label} (evaluation/{label})")
            for label in labels
        ),
        (find_manifest(run / "merged") is not None, "the merged model (merged)"),
        (bool(artifacts_in(run / "compressed")), "the compressed models (compressed)"),
        *(
            (label in evaluations, f"measurements of {label} (evaluation/{label})")
            for label in artifacts_in(run / "compressed")
        ),
        (find_manifest(run / "answer") is not None, "the answer (answer)"),
    ]
    return [what for is_there, what in checks if not is_there]
