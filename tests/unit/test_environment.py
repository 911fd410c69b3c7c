import subprocess
import sys

import pytest

FREED = """
from pathlib import Path
from mutirao.environment import release_memory

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def most(blocks):
    return [bytes(60_000) for _ in range(blocks)]

held = most(2_000)
last = bytes(60_000)  # above them, so that malloc cannot shrink its heap by itself
full = resident()
del held
kept = resident()
release_memory()
print(full - kept, full - resident(), len(last))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_malloc_keeps_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    before, after, _ = map(int, done.stdout.split())
    assert before < 20_000_000  # of 120 MB that were freed
    assert after > 90_000_000
