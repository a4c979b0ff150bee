"""Keep freed memory: glibc gives large blocks back to the system after every step and faults them
in again, which costs a training step on the CPU a third of its time."""

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

# malloc.h: the numbers of mallopt's parameters.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve blocks up to 1 GiB from the heap and never to trim it.

    Call before the first tensor. The resident size then stays at its peak. Returns whether it was
    done: other C libraries have no such switch.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}
    kept = all(mallopt(key, value) for key, value in settings.items())
    log.info("allocator: freed memory is %s", "kept" if kept else "left to glibc's defaults")
    return kept
