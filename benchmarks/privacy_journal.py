"""What the privacy benchmark has finished, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from privacy_settings import Sizes


class Journal:
    """Finished cells in a folder of their own for each set of sizes."""

    def __init__(self, folder: Path, sizes: Sizes, *, fresh: bool) -> None:
        folder_of_code = Path(__file__).parent
        code = b"".join(path.read_bytes() for path in sorted(folder_of_code.glob("*privacy*.py")))
        key = hashlib.sha256(json.dumps(asdict(sizes)).encode() + code).hexdigest()[:12]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self.folder.iterdir():
                path.unlink()

    def tensors(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made before under this name, or make and keep it."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            made = make()
            torch.save(made, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return torch.load(path, weights_only=True)

    def figures(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The same for figures, with the seconds that they took."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            started, started_cpu = time.monotonic(), time.process_time()
            row = make()
            row["seconds"] = round(time.monotonic() - started, 1)
            row["processor_seconds"] = round(time.process_time() - started_cpu, 1)
            path.with_suffix(".part").write_text(json.dumps(row), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            print(f"{name}: {row['seconds']:.0f} s", file=sys.stderr)
        return json.loads(path.read_bytes())
