"""The probe on small files and matrices; its cache; memory limits of made-up control groups."""

import dataclasses
import datetime
import errno
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from small_machine import small_machine

from mutirao.errors import DiskFullError, FormatError, InputError, MissingKernelError
from mutirao.inference.native.library import load_library
from mutirao.inference.planning import machine as machine_module
from mutirao.inference.planning import probe as probe_module
from mutirao.inference.planning.machine import (
    PRODUCT_TOKENS,
    DiskSpeed,
    Machine,
    ProductSpeed,
    memory_limits,
    merged_widths,
)
from mutirao.inference.planning.probe import arrangements, is_disturbed, measure, probe
from mutirao.inference.store.plane_formats import FORMATS


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A probe of a fraction of a second, in a home of its own."""
    try:
        load_library()
    except MissingKernelError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe_module, "ROUNDS", 2)
    monkeypatch.setattr(probe_module, "READ_SLICE_S", 0.001)
    monkeypatch.setattr(probe_module, "FILE_BYTES", 1 << 23)
    monkeypatch.setattr(probe_module, "PRODUCT_S", 1e-4)
    monkeypatch.setattr(probe_module, "_matrix_bytes", lambda: 1 << 20)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A probe that only counts how often it measures."""
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    calls = []

    def measured(directory, num_threads):
        calls.append((directory, num_threads))
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        return small_machine(measured_on=today, num_threads=num_threads)

    monkeypatch.setattr(probe_module, "measure", measured)
    monkeypatch.setattr(
        probe_module,
        "load_library",
        lambda: types.SimpleNamespace(engine_best_kernels=lambda: b"avx2"),
    )
    return calls


# ---- Measuring ----------------------------------------------------------------------------------


def test_everything_is_measured_and_nothing_is_left(quick, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    found = measure(folder, 1)
    assert list(folder.iterdir()) == []
    assert {(e.chunk_bytes, e.num_readers) for e in found.reads} == {
        (chunk, readers) for chunk in probe_module.CHUNK_BYTES for readers in (1, 4, 8)
    }
    assert all(1e5 < each.bytes_per_s < 1e12 for each in found.reads)
    assert {each.format for each in found.products} == set(FORMATS)
    assert all(0 < cost < 1e-3 for each in found.products for cost in each.s_per_weight)
    assert found.num_threads == 1
    assert 0 <= found.waited_share < 1
    assert Machine.from_json(found.to_json()) == found


def test_a_large_file_is_read_where_there_is_one(quick, tmp_path, monkeypatch):
    large = tmp_path / "store" / "weights.bin"
    large.parent.mkdir()
    large.write_bytes(bytes(1 << 23))
    before = large.stat().st_mtime_ns
    monkeypatch.setattr(
        probe_module.tempfile, "NamedTemporaryFile", lambda **_: pytest.fail("a file was written")
    )
    with probe_module._file_to_read(tmp_path) as path:
        assert path == large
    assert large.stat().st_mtime_ns == before


def test_links_and_small_files_are_not_read(quick, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").write_bytes(bytes(1 << 23))
    (tmp_path / "disk" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "disk" / "small").write_bytes(bytes(1 << 22))
    with probe_module._file_to_read(tmp_path / "disk") as path:
        assert path.name.startswith(".mutirao-probe-")
        assert path.stat().st_size == 1 << 23
    assert not path.exists()


def test_a_full_disk_is_refused_with_what_is_needed(quick, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=1 << 30, used=1 << 30, free=9 << 20)
    monkeypatch.setattr(probe_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"9 MB free.*8 MB.*MUTIRAO_HOME"):
        measure(tmp_path, 1)


def test_a_folder_that_cannot_be_written_is_refused(quick, tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "not allowed")

    monkeypatch.setattr(probe_module.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot be written"):
        measure(tmp_path, 1)


def test_without_direct_reads_the_page_cache_is_used_and_told(quick, tmp_path, monkeypatch):
    real = os.open

    def without_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest)

    monkeypatch.setattr(probe_module.os, "open", without_direct)
    (tmp_path / "disk").mkdir()
    found = measure(tmp_path / "disk", 1)
    assert found.direct is False
    assert all(each.bytes_per_s > 0 for each in found.reads)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_arrangement_of_planes_has_a_kernel(quick, name):
    buffer = np.full(1 << 20, probe_module.FILL, np.uint8)
    kernels = load_library().engine_best_kernels().decode()
    for widths in arrangements(FORMATS[name]):
        for num_tokens in PRODUCT_TOKENS[:-1]:
            cost = probe_module._time_product(
                kernels, 1, FORMATS[name], widths, num_tokens, buffer, 1e5
            )
            assert 0 < cost < 1e-3


def test_arrangements_are_those_of_drafts_and_of_full_passes():
    assert set(arrangements(FORMATS["Q4_K"])) == {(4,), (2, 1, 1), (2,), (2, 1)}
    assert arrangements(FORMATS["Q6_K"])[0] == (4, 2)
    assert (4, 2, 2) in arrangements(FORMATS["Q8_0"])
    assert arrangements(FORMATS["BF16"]) == [()]
    assert merged_widths(FORMATS["Q5_0"], 4) == (4, 1)
    assert merged_widths(FORMATS["Q8_0"], 5) == (8,)
    assert merged_widths(FORMATS["Q4_0"], 2) == (2, 1)


def test_the_median_is_kept_and_the_range_of_the_quartiles():
    assert probe_module._median_and_spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, pytest.approx(2 / 3))
    assert probe_module._median_and_spread([7.0]) == (7.0, 0.0)


def test_a_probe_whose_rounds_differ_was_disturbed():
    quiet = small_machine()
    reads = tuple(dataclasses.replace(each, spread=0.9) for each in quiet.reads)
    assert not is_disturbed(quiet)
    assert is_disturbed(dataclasses.replace(quiet, reads=reads))
    assert is_disturbed(dataclasses.replace(quiet, waited_share=0.3))


# ---- Products that were not timed ---------------------------------------------------------------


def test_an_arrangement_that_was_not_timed_is_scaled_from_its_like():
    num = len(PRODUCT_TOKENS)
    products = (
        ProductSpeed("Q4_K", (4,), (2.0,) * num, 0.0),
        ProductSpeed("Q4_K", (2,), (1.0,) * num, 0.0),
        ProductSpeed("Q4_0", (4,), (3.0,) * num, 0.0),
    )
    machine = small_machine(products=products)
    assert machine.product_s("Q4_0", (2,), 10, 1) == pytest.approx(15.0)
    with pytest.raises(FormatError, match=r"Q6_K.*--probe"):
        machine.product_s("Q6_K", (4, 2), 10, 1)


# ---- The cache ----------------------------------------------------------------------------------


def test_a_machine_is_measured_once(counted, tmp_path):
    first = probe(tmp_path, 2)
    assert probe(tmp_path, 2) == first
    assert len(counted) == 1
    probe(tmp_path, 1)
    assert len(counted) == 2
    probe(tmp_path, 2, refresh=True)
    assert len(counted) == 3


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(counted, tmp_path):
    probe(tmp_path / "not" / "there", 1)
    assert counted == [(tmp_path, 1)]


@pytest.mark.parametrize("damage", ["old", "damaged", "other version", "not positive", "future"])
def test_what_cannot_be_used_is_measured_again(counted, tmp_path, damage):
    probe(tmp_path, 2)
    (path,) = (tmp_path / "home" / "cache" / "probes").iterdir()
    values = json.loads(path.read_text())
    if damage == "old":
        values["measured_on"] = "2020-01-01"
    elif damage == "future":
        values["measured_on"] = "2999-01-01"
    elif damage == "other version":
        values["version"] = 0
    elif damage == "not positive":
        values["reads"][0]["bytes_per_s"] = 0
    path.write_text("{" if damage == "damaged" else json.dumps(values))
    probe(tmp_path, 2)
    assert len(counted) == 2
    probe(tmp_path, 2)
    assert len(counted) == 2


def test_a_disturbed_probe_is_good_for_a_day_only(counted, tmp_path):
    probe(tmp_path, 2)
    (path,) = (tmp_path / "home" / "cache" / "probes").iterdir()
    machine = Machine.from_json(path.read_text())
    reads = tuple(dataclasses.replace(each, spread=0.9) for each in machine.reads)
    yesterday = datetime.datetime.now(tz=datetime.UTC).date() - datetime.timedelta(days=1)
    for change, calls in (({}, 1), ({"reads": reads}, 2)):
        changed = dataclasses.replace(machine, measured_on=yesterday.isoformat(), **change)
        path.write_text(changed.to_json())
        probe(tmp_path, 2)
        assert len(counted) == calls


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "null"])
def test_other_files_are_no_machines(text):
    with pytest.raises(FormatError, match="--probe"):
        Machine.from_json(text)


def test_a_machine_without_readings_is_no_machine():
    with pytest.raises(FormatError, match="missing"):
        Machine.from_json(small_machine(reads=()).to_json())
    bad = small_machine(reads=(DiskSpeed(1 << 20, 1, float("nan"), 0.0),))
    with pytest.raises(FormatError, match="positive"):
        Machine.from_json(bad.to_json())


# ---- Memory -------------------------------------------------------------------------------------


def _group(folder, version, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    if version == 1:
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 5\ntotal_inactive_file {inactive}\n")
    else:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_are_found_up_to_the_root(tmp_path, version):
    root = tmp_path / "cgroup"
    top = root / "memory" if version == 1 else root
    _group(top, version, "max" if version == 2 else 1 << 62, 10, 0)
    _group(top / "outer", version, 700, 300, 100)
    _group(top / "outer" / "inner", version, "max" if version == 2 else 1 << 62, 50, 0)
    line = "9:cpu:/x\n8:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n"
    (tmp_path / "membership").write_text(line)
    found = machine_module._group_limits(tmp_path / "membership", root)
    assert (700, 200) in found
    assert min(limit for limit, _ in found) == 700


def test_a_group_whose_folder_is_not_visible_is_left_to_the_root(tmp_path):
    root = tmp_path / "cgroup"
    _group(root, 2, 500, 100, 0)
    (tmp_path / "membership").write_text("0::/../../elsewhere\n")
    assert machine_module._group_limits(tmp_path / "membership", root) in ([(500, 100)], [])
    (tmp_path / "membership").write_text("0::/not/there\n")
    assert machine_module._group_limits(tmp_path / "membership", root) == [(500, 100)]
    assert machine_module._group_limits(tmp_path / "no-such-file", root) == []


def test_memory_limits_are_those_of_the_narrowest(monkeypatch):
    whole = memory_limits()
    assert 0 < whole.available_bytes <= whole.total_bytes
    monkeypatch.setattr(
        machine_module, "_group_limits", lambda *_: [(1_000_000, 400_000), (2_000_000, 1_900_000)]
    )
    limits = memory_limits()
    assert (limits.total_bytes, limits.available_bytes) == (1_000_000, 100_000)


def test_the_probe_needs_no_framework():
    code = (
        "import sys, mutirao.inference.planning.probe, mutirao.inference.planning.planner; "
        "print([name for name in ('torch', 'transformers', 'pandas', 'scipy', 'gguf') "
        "if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
