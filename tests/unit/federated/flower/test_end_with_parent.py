"""A process ends with its parent, even one that was gone before it could ask for that."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux's kernel")

CHILD = """
import os, signal, sys, time
from mutirao.federated.flower.processes import end_with_parent
end_with_parent(int(sys.argv[1]) or os.getppid(), signal.SIGTERM)
print("on", flush=True)
"""


@pytest.mark.parametrize(("parent", "code", "said"), [(0, 0, b"on\n"), (2**22 + 1, -15, b"")])
def test_one_whose_parent_is_gone_already_ends_at_once(parent, code, said):
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(parent)], capture_output=True, check=False, timeout=60
    )
    assert (found.returncode, found.stdout) == (code, said)
    assert signal.SIGTERM == 15
