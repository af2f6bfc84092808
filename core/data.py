"""Encoded bytes, wherever they lie: in memory, in another's memory, or in a file that is mapped."""

from __future__ import annotations

import mmap

# Anything here has `len`, and gives its bytes to `memoryview`, a hash or a file without being copied.
Data = bytes | bytearray | memoryview | mmap.mmap
