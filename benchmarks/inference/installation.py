"""The peers, installed in places of their own, at pinned versions.

llama.cpp is compiled for this very processor from the source that llama-cpp-python carries
(10 minutes on two cores; needs cmake and a C++ compiler): the wheels on PyPI are built for
any x86-64 with AVX2 and were slower here (xllamacpp 2026.10: 27 tokens/s, this build 34; Zen 4,
2026-11-22). accelerate and AirLLM go into a virtual environment.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import httpx
from peer_environment import PeerError, call, make_environment

from mutirao.artifact import sha256_of_file
from mutirao.sources.download import RemoteFile, download

REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.19.0",
    "accelerate==1.15.0",
    "airllm==4.0.0",
    "numpy>=2",
)
LLAMA_CPP_VERSION = "llama-cpp-python 0.3.36"
LLAMA_CPP_FILE = "llama_cpp_python-0.3.36.tar.gz"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
LLAMA_CPP_PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-bench")


def install_python_peers(folder: Path) -> Path:
    """Make the virtual environment of accelerate and AirLLM; return its Python.

    Raises:
        PeerError: pip failed; its last words are in the message.
    """
    return make_environment(folder / "venv", REQUIREMENTS)


def build_llama_cpp(folder: Path) -> Path:
    """Compile llama.cpp; return the folder of its programs.

    Raises:
        PeerError: no compiler, or the build failed.
        NetworkError: the source could not be downloaded.
    """
    programs = folder / "llama.cpp" / "bin"
    if all((programs / name).is_file() for name in LLAMA_CPP_PROGRAMS):
        return programs
    if shutil.which("cmake") is None:
        raise PeerError("llama.cpp cannot be built: cmake is missing (install cmake and g++)")
    archive = download_source(folder)
    source = folder / "llama-source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    root = next(source.iterdir()) / "vendor" / "llama.cpp"
    build = folder / "llama-build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    call(["cmake", "-S", str(root), "-B", str(build), *generator, *LLAMA_CPP_OPTIONS])
    targets = ["--target", *LLAMA_CPP_PROGRAMS]
    call(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1), *targets])
    programs.mkdir(parents=True, exist_ok=True)
    for name in LLAMA_CPP_PROGRAMS:
        shutil.copy2(build / "bin" / name, programs / name)
    shutil.rmtree(source)
    shutil.rmtree(build)
    return programs


def download_source(folder: Path) -> Path:
    archive = folder / LLAMA_CPP_FILE
    if archive.is_file() and sha256_of_file(archive) == LLAMA_CPP_SHA256:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    index = os.environ.get("MUTIRAO_INDEX_URL") or "https://pypi.org/simple"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with httpx.Client(follow_redirects=True, timeout=60.0) as client:
        listing = client.get(f"{index.rstrip('/')}/llama-cpp-python/", headers=accept)
        listing.raise_for_status()
        file = next(each for each in listing.json()["files"] if each["filename"] == LLAMA_CPP_FILE)
        url = str(listing.url.join(file["url"]))
        remote = RemoteFile(LLAMA_CPP_FILE, url, LLAMA_CPP_SHA256, file.get("size"))
        part = folder / f"{LLAMA_CPP_FILE}.part"
        download(client, remote, part, LLAMA_CPP_VERSION)
    return part.rename(archive)
