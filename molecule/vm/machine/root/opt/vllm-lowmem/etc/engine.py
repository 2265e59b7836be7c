"""STUB of an engine: takes as much memory as the file beside it says, `ordinary MIB` or `locked MIB`, and
keeps it.
"""

import ctypes
import mmap
import sys
import time
from pathlib import Path

kind, mib = Path(__file__).with_name("engine.txt").read_text().split()
taken = mmap.mmap(-1, int(mib) << 20)
if kind == "locked":
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(taken))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(int(mib) << 20)):
        sys.exit(f"mlock: error {ctypes.get_errno()}")
for offset in range(0, len(taken), mmap.PAGESIZE):
    taken[offset] = 1
print(f"holds {mib} MiB, {kind}", flush=True)
time.sleep(100_000)
