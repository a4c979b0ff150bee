"""Who listens to the network: the sockets of a process and all it started, from ``/proc``."""

import ipaddress
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def addresses(mark: str) -> set[str]:
    """The addresses on which processes listen whose environment holds the mark."""
    marked = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if mark.encode() in (process / "environ").read_bytes():
                marked.append(int(process.name))
    return of(marked)


def of(pids: Iterable[int]) -> set[str]:
    """The addresses on which processes listen."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):  # it has ended
            links = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
            inodes |= {found[1] for link in links if (found := re.match(r"socket:\[(\d+)\]", link))}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == "0A" and fields[9] in inodes:
                found.add(_address(local.split(":")[0]))
    return found


def _address(text: str) -> str:
    """The kernel prints an address as 32-bit words in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, packed)


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def watched(process: "subprocess.Popen[str]", mark: str, patience: float) -> set[str]:
    """The addresses on which a process and its descendants have listened until it ended."""
    seen: set[str] = set()
    until = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < until:
        seen |= addresses(mark)
        time.sleep(0.5)
    return seen
