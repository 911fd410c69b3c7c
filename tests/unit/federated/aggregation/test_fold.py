"""The fold from files: hand-computed means, no order, memory that does not grow with the sites."""

import tracemalloc

import numpy as np
import pytest
from fake_federation import KEYS, RUN_ID, SHAPES, make_start

from mutirao.errors import ArtifactError, InputError, UpdateError
from mutirao.federated.aggregation.fold import Directions, RoundUpdates, combine
from mutirao.federated.aggregation.robust import (
    coordinate_median,
    multi_krum,
    select_krum,
    trimmed_mean,
)
from mutirao.federated.aggregation.updates import (
    ParcelFile,
    check_update,
    decoder,
    read_parcel,
    write_parcel,
)
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.messages import tensor_payloads
from mutirao.federated.parcel import Parcel

SITES = tuple(f"s{i:02d}" for i in range(7))
CODEC = CodecConfig(format="int8")


def _parcel(site, update, codec=CODEC, **payloads):
    encoded = tensor_payloads(encode_tensors(update, codec))
    return Parcel("update", RUN_ID, 1, site, {"a": 1}, {**encoded, **payloads}).signed(KEYS[site])


def _update(site, shapes=SHAPES, scale=0.01):
    rng = np.random.default_rng([*site.encode()])
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}


def _keep(folder, sites=SITES, *, updates=None, shapes=SHAPES, codec=CODEC, weights=None):
    decoded = {}
    for site in sites:
        update = updates[site] if updates else _update(site, shapes)
        parcel = _parcel(site, update, codec)
        write_parcel(folder / f"{site}.parcel", parcel)
        decoded[site] = decode_tensors(encode_tensors(update, codec), shapes, codec)
    files = {site: ParcelFile(folder / f"{site}.parcel") for site in sites}
    weights = weights or {site: float(7 + 3 * i) for i, site in enumerate(sites)}
    return RoundUpdates(shapes, weights, decoder(files, shapes, codec), scratch=folder), decoded


def test_the_mean_is_weighted_and_made_in_float64(tmp_path):
    updates, decoded = _keep(tmp_path)
    mean = combine(updates, "mean")
    for name, shape in SHAPES.items():
        total, weights = np.zeros(shape), 0.0
        for site in SITES:
            total += updates.weights[site] * decoded[site][name].astype(np.float64)
            weights += updates.weights[site]
        found = mean(name)
        assert found.dtype == np.float64
        assert found.tobytes() == (total / weights).tobytes()


def test_the_order_of_sites_and_of_questions_changes_nothing(tmp_path):
    updates, _ = _keep(tmp_path)
    weights = dict(reversed(updates.weights.items()))
    other = RoundUpdates(SHAPES, weights, updates.decode, scratch=tmp_path)
    for rule in ("mean", "median", "trimmed_mean", "krum", "multi_krum"):
        one, two = combine(updates, rule), combine(other, rule)
        for name in reversed(SHAPES):
            assert one(name).tobytes() == two(name).tobytes()


def test_robust_rules_are_those_in_memory(tmp_path):
    lies = {site: _update(site) for site in SITES}
    lies["s03"] = {name: values + 5 for name, values in lies["s03"].items()}
    updates, decoded = _keep(tmp_path, updates=lies)
    expected = {
        "median": coordinate_median(decoded),
        "trimmed_mean": trimmed_mean(decoded, 2),
        "krum": multi_krum(decoded, 2, 1),
        "multi_krum": multi_krum(decoded, 2, len(SITES) - 2),
    }
    assert "s03" not in select_krum(decoded, 2, len(SITES) - 2)
    for rule, values in expected.items():
        mean = combine(updates, rule, num_faulty=2)
        for name in SHAPES:
            found = mean(name).astype(np.float32)
            np.testing.assert_allclose(found, values[name], rtol=1e-6, atol=1e-9, err_msg=rule)


def test_norms_and_cosines_are_those_of_whole_vectors(tmp_path):
    updates, decoded = _keep(tmp_path)
    mean, directions = combine(updates, "mean"), Directions(updates)
    means = {name: mean(name) for name in SHAPES}
    for name, values in means.items():
        directions.add(name, values)
    whole = np.concatenate([means[name].reshape(-1) for name in SHAPES])
    for site in SITES:
        vector = np.concatenate([decoded[site][name].reshape(-1) for name in SHAPES])
        vector = vector.astype(np.float64)
        assert directions.norms[site] == pytest.approx(np.linalg.norm(vector))
        cosine = vector @ whole / np.linalg.norm(vector) / np.linalg.norm(whole)
        assert directions.cosines[site] == pytest.approx(cosine)


def test_an_update_of_zeros_has_no_direction(tmp_path):
    zeros = {"s00": {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}}
    updates, _ = _keep(tmp_path, ("s00",), updates=zeros)
    directions = Directions(updates)
    for name in SHAPES:
        directions.add(name, combine(updates, "mean")(name))
    assert directions.cosines == {"s00": None}


@pytest.mark.parametrize("rule", ["mean", "median", "multi_krum"])
def test_memory_does_not_grow_with_the_sites(tmp_path, rule):
    shapes = {"large": (300_000,), "small": (1_000,)}
    peaks = []
    for num_sites in (4, 32):
        folder = tmp_path / str(num_sites)
        folder.mkdir()
        sites = tuple(f"s{i:02d}" for i in range(num_sites))
        updates, _ = _keep(folder, sites, shapes=shapes)
        tracemalloc.start()
        mean = combine(updates, rule, num_faulty=0)
        directions = Directions(updates)
        for name in shapes:
            directions.add(name, mean(name))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.05 * peaks[0], peaks
    assert peaks[0] < 20 * 4 * 300_000


def test_a_file_is_what_the_parcel_says_and_is_read_back(tmp_path):
    parcel = _parcel("s00", _update("s00"))
    path = tmp_path / "s00.parcel"
    write_parcel(path, parcel)
    assert path.read_bytes() == parcel.to_bytes()
    again = read_parcel(path)
    assert again is not None
    assert again.sha256 == parcel.sha256
    file = ParcelFile(path)
    assert file.fields == parcel.fields
    for name, payload in parcel.payloads.items():
        assert (file.payload(name) == payload).all()


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_cut_file_is_named_and_counts_as_none(tmp_path, cut):
    path = tmp_path / "s00.parcel"
    write_parcel(path, _parcel("s00", _update("s00")))
    path.write_bytes(path.read_bytes()[:cut])
    assert read_parcel(path) is None
    with pytest.raises(ArtifactError, match=r"s00\.parcel is damaged"):
        ParcelFile(path)


def test_a_sound_update_passes_with_its_norm():
    update = _update("s00")
    norm = check_update(_parcel("s00", update), SHAPES, CODEC)
    decoded = decode_tensors(encode_tensors(update, CODEC), SHAPES, CODEC)
    squares = sum(np.square(values, dtype=np.float64).sum() for values in decoded.values())
    assert norm == pytest.approx(np.sqrt(squares))


def _nan(update):
    payloads = encode_tensors(update, CodecConfig(format="fp32"))
    payloads["a.weight"][-4:] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    return payloads


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("a.weight"), "sent no tensor"),
        (lambda p: p.update({"more": p["a.weight"]}), "was not agreed"),
        (lambda p: p.update({"a.weight": p["b.weight"]}), "payload of tensor 'a.weight'"),
        (lambda p: p.update({"a.weight": np.zeros(10**6, np.uint8)}), "shape .1000000"),
        (lambda p: p.update(_nan(_update("s00"))), "not finite"),
    ],
)
def test_a_broken_update_is_refused_by_the_site_name(change, words):
    codec = CodecConfig(format="fp32")
    payloads = encode_tensors(_update("s00"), codec)
    change(payloads)
    parcel = Parcel("update", RUN_ID, 1, "s00", {}, tensor_payloads(payloads))
    with pytest.raises(UpdateError, match=words) as caught:
        check_update(parcel, SHAPES, codec)
    assert str(caught.value).startswith("site s00")


def test_an_update_beyond_the_agreed_norm_is_refused():
    parcel = _parcel("s00", make_start())
    with pytest.raises(UpdateError, match=r"site s00 sent an update of norm .* at most 0\.5"):
        check_update(parcel, SHAPES, CODEC, max_norm=0.5)


def test_other_payloads_beside_the_tensors_are_refused():
    parcel = _parcel("s00", _update("s00"), extra=np.zeros(3, np.uint8))
    with pytest.raises(UpdateError, match="was not agreed"):
        check_update(parcel, SHAPES, CODEC)


def test_rounds_without_updates_or_with_bad_weights_are_refused(tmp_path):
    updates, _ = _keep(tmp_path, ("s00", "s01"))
    with pytest.raises(UpdateError, match="no site"):
        combine(updates.without("s00", "s01"), "mean")
    bad = RoundUpdates(SHAPES, {"s00": float("nan")}, updates.decode)
    with pytest.raises(UpdateError, match="weight nan"):
        combine(bad, "mean")


def test_too_few_sites_for_a_robust_rule_are_refused(tmp_path):
    updates, _ = _keep(tmp_path, ("s00", "s01", "s02"))
    for rule in ("krum", "multi_krum"):
        with pytest.raises(InputError, match="Krum wants"):
            combine(updates, rule, num_faulty=1)
    with pytest.raises(InputError, match="num_trimmed=2"):
        combine(updates, "trimmed_mean", num_faulty=2)
