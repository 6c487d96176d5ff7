"""A disk of its own for a test, which becomes full or read-only at a chosen moment. It needs root, Linux and tmpfs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT, _DETACH = 1, 32, 2


def can_mount() -> bool:
    """Returns whether this user may mount."""
    return os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK)


class SmallDisk:
    """A tmpfs at a folder, which is made."""

    def __init__(self, folder: Path, size: int) -> None:
        """Raises OSError where it cannot be mounted."""
        self.folder, self.size = folder, size
        folder.mkdir()
        self._mount(0, size)

    def fill(self, left: int) -> None:
        """Leaves so many bytes free, about: whole pages."""
        state = os.statvfs(self.folder)
        self._mount(_REMOUNT, (state.f_blocks - state.f_bfree) * state.f_frsize + max(left, 1))

    def make_read_only(self) -> None:
        self._mount(_REMOUNT | _READ_ONLY, self.size)

    def make_room(self) -> None:
        """Gives it its first size again, and lets it be written."""
        self._mount(_REMOUNT, self.size)

    def close(self) -> None:
        _LIBC.umount2(os.fsencode(self.folder), _DETACH)

    def _mount(self, flags: int, size: int) -> None:
        if _LIBC.mount(b"none", os.fsencode(self.folder), b"tmpfs", flags, f"size={size}".encode()):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.folder))
