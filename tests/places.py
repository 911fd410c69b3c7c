"""Machines of different organisations, as Linux network namespaces on one bridge.

Each place has an address, and a folder that it sees as its home; those of the others are not
there for it. It has no route but to the bridge's own network, and the bridge lies in a
namespace of its own, so nothing of the real machine's network is touched or reached. What
passes the bridge is written down. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

WATCH = """
import socket, struct, sys
seen = set()
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
with open(sys.argv[1], "w", buffering=1) as file:
    print("watching", file=file)
    while True:
        frame = tap.recv(2048)
        if frame[12:14] == b"\\x86\\xdd":
            line = "ipv6"
        elif frame[12:14] != b"\\x08\\x00":
            continue
        else:
            packet = frame[14:]
            source, target = (socket.inet_ntoa(packet[at : at + 4]) for at in (12, 16))
            segment = packet[4 * (packet[0] & 15) :]
            opens = packet[9] == 6 and segment[13] & 0x12 == 2
            port = struct.unpack("!H", segment[2:4])[0] if opens else 0
            line = f"{source} {target} {'opens' if opens else 'sends'} {port}"
        if line not in seen:
            seen.add(line)
            print(line, file=file)
"""
"""Writes a line for each pair of addresses between which packets pass, and each port called."""
ENTER = """
mount --bind "$OWN_FOLDER" "$HOME"
mount -t tmpfs tmpfs "$ALL_FOLDERS"
cd "$HOME"
unset OWN_FOLDER ALL_FOLDERS
exec bash -euo pipefail -c "$1"
"""
"""Runs in a mount namespace of its own, which ``ip netns exec`` makes."""


def why_impossible() -> str:
    """Return why this machine cannot do that; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if missing := [each for each in ("ip", "mount", "bash") if shutil.which(each) is None]:
        return f"{', '.join(missing)} is missing (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mutirao-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge0", "type", "bridge")
    except RuntimeError as error:
        return f"this machine allows no network namespaces: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Places:
    """The machines; leaving the context ends what still runs in them, and removes them.

    Args:
        folder: holds their folders, 'all/NAME', and what they print, 'NAME.log'.
        addresses: of each place, by name, in one network of 256.
    """

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self._folder = folder
        self._bridge = f"mutirao-{os.getpid()}-bridge"
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Places:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        names = [*map(self.namespace, self.addresses), self._bridge]
        for name in names:
            for pid in _pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for each in self._running:
            each.wait(30)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        left = [each for each in _ip("netns").split() if each in names]
        assert not left, f"network namespaces are left: {left}"

    def namespace(self, place: str) -> str:
        return f"mutirao-{os.getpid()}-{place}"

    def folder(self, place: str) -> Path:
        return self._folder / "all" / place

    def printed(self, place: str) -> str:
        """Return all that was printed at a place so far."""
        return (self._folder / f"{place}.log").read_text(errors="replace")

    def start(self, place: str, script: str) -> subprocess.Popen[bytes]:
        """Run a script at a place, in its folder and a terminal session of its own."""
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        home = self._folder / "home"
        environment |= {
            "HOME": str(home),
            "MUTIRAO_HOME": str(home / ".mutirao"),
            "TMPDIR": str(home / ".tmp"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "200",
            "OWN_FOLDER": str(self.folder(place)),
            "ALL_FOLDERS": str(self._folder / "all"),
        }
        enter = ["bash", "-euo", "pipefail", "-c", ENTER, "bash", script]
        with (self._folder / f"{place}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(place), *enter],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def interrupt(self, process: subprocess.Popen[bytes]) -> None:
        """Press Ctrl-C in a script's terminal."""
        os.killpg(process.pid, signal.SIGINT)

    def num_processes(self, place: str) -> int:
        """Return how many processes run at a place."""
        return len(_pids(self.namespace(place)))

    def num_unroutable(self, place: str) -> int:
        """Return how often a process of a place wanted to reach an address beyond the bridge."""
        shown = _ip("netns", "exec", self.namespace(place), "cat", "/proc/net/snmp").splitlines()
        names, values = (line.split() for line in shown if line.startswith("Ip:"))
        return int(dict(zip(names, values, strict=True))["OutNoRoutes"])

    def traffic(self) -> list[list[str]]:
        """Return who sent packets to whom, and who opened connections to which port."""
        return [line.split() for line in self._seen().splitlines()[1:]]

    def _seen(self) -> str:
        path = self._folder / "traffic"
        return path.read_text() if path.exists() else ""

    def _make(self) -> None:
        (self._folder / "home").mkdir(parents=True)
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge0", "type", "bridge")
        _without_ipv6(self._bridge)
        _ip("-n", self._bridge, "link", "set", "bridge0", "up")
        for number, (place, address) in enumerate(self.addresses.items()):
            (self.folder(place) / ".tmp").mkdir(parents=True)
            name, port = self.namespace(place), f"port{number}"
            _ip("netns", "add", name)
            _without_ipv6(name)
            pair = ["peer", "name", "eth0", "netns", name]
            _ip("-n", self._bridge, "link", "add", port, "type", "veth", *pair)
            _ip("-n", self._bridge, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
        command = [sys.executable, "-c", WATCH, str(self._folder / "traffic")]
        self._running.append(subprocess.Popen(["ip", "netns", "exec", self._bridge, *command]))
        deadline = time.monotonic() + 60
        while not self._seen():
            assert time.monotonic() < deadline, "nobody watches the bridge"
            time.sleep(0.1)


def _without_ipv6(namespace: str) -> None:
    script = (
        "for each in all default; do f=/proc/sys/net/ipv6/conf/$each/disable_ipv6; "
        "test ! -e $f || echo 1 > $f; done"
    )
    _ip("netns", "exec", namespace, "bash", "-c", script)


def _pids(namespace: str) -> list[int]:
    shown = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in shown.stdout.split()]
