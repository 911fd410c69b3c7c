"""Compile the inference kernels while the package is built, where there is a C compiler.

Without one the package is built all the same: inference then runs in plain PyTorch, and says
so, or compiles the kernels later, when there is a compiler.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD_FILE = Path(__file__).parent / "src/mutirao/inference/native/build.py"


class KernelBuildHook(BuildHookInterface[Any]):
    """Adds the compiled library to wheels, and to the tree of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        if self.target_name != "wheel":
            return
        spec = importlib.util.spec_from_file_location("build_kernels", BUILD_FILE)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        path = BUILD_FILE.parent / build.library_name()
        for old in BUILD_FILE.parent.glob("kernels-*.so"):
            if old != path:
                old.unlink()
        try:
            if not path.is_file():
                build.compile_library(path)
        except build.CompileError as error:
            print(f"mutirao: no inference kernels in this build: {error}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{build.platform_tag()}"
        build_data["artifacts"].append(f"/{path.relative_to(Path(self.root))}")
