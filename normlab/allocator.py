"""Keep freed memory: glibc gives large blocks back to the system after every step and faults them
in again, which costs a training step on the CPU a third of its time."""

import ctypes
import sys

# malloc.h: the numbers of mallopt's parameters.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and never to trim it.

    Call before the first tensor. The resident size then stays at its peak. Returns whether it was
    done: other C libraries have no such switch.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trimmed = [mallopt(_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_TOP_PAD, 64 << 20)]
    # Blocks up to 1 GiB; older glibc takes 32 MiB at most.
    mapped = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(mapped and all(trimmed))
