"""How a process of the sandbox gives up its rights: namespaces, limits, Landlock, another user. Linux, by ctypes.

Standard library only (jail.py). Each function says what the OS granted; what it did not is no error here, as
sandbox.py tells of it, but a right that was to go and stays is an OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import stat
import struct
from collections.abc import Mapping
from typing import Any

NAMESPACES = {"pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000, "mount": 0x00020000}
NEW_USER = 0x10000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE, MNT_DETACH = 0x2, 0x4, 0x4000, 0x40000, 0x2
CAPABILITY_VERSION_3 = 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 0, 1 << 1, 1 << 2, 1 << 3
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/localtime", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full")

libc = ctypes.CDLL(None, use_errno=True)


def separate(root: bool) -> list[str]:
    """Enter new namespaces; return the names of those the OS granted."""
    uid, gid = os.geteuid(), os.getegid()
    if not root:
        if not hasattr(libc, "unshare") or libc.unshare(NEW_USER) != 0:
            return []
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as stream:
                    stream.write(text)
        except OSError:
            return []
    granted = [] if root else ["user"]
    return granted + [name for name, flag in NAMESPACES.items() if libc.unshare(flag) == 0]


def own_disk(folder: str, size: int) -> bool:
    """Put an empty file system of at most `size` bytes on the folder, seen by the cell alone."""
    options = f"size={size},nr_inodes=4096,mode=777".encode()
    return (
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0
    )


def give_disk_back(folder: str) -> None:
    """Take that file system away with all that is in it."""
    libc.umount2(folder.encode(), MNT_DETACH)


def limits(order: Mapping[str, Any], granted: list[str], *, own_user: bool) -> None:
    """Set the limits of a process and its children; what the caller was given less of stays less."""
    processes = order["processes"]
    if not own_user:
        # Such a limit counts all processes of a user; in a user namespace of one's own, only those in it.
        processes += 3 if "user" in granted else _running(os.getuid())
    cpu = int(order["seconds"]) + 1
    for limit, value in (
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _running(uid: int) -> int:
    """Return how many threads a user has."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def landlock(folder: str, *, library: str) -> list[str]:
    """Restrict files to reading the system's programs and writing one's own folder; return what the kernel held.

    Landlock needs no privilege. Newer kernels also refuse TCP, and signals to processes outside of the cell.
    """
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return []
    everything = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("=QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return []
    allowed = [(path, EXECUTE | READ_FILE | READ_FOLDER) for path in (*READABLE, library)]
    allowed += [(path, READ_FILE | WRITE_FILE) for path in DEVICES]
    for path, access in [*allowed, (folder, everything)]:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH)
            if not stat.S_ISDIR(os.fstat(handle).st_mode):
                access &= ~READ_FOLDER
            rule = struct.pack("=Qi", access & everything, handle)
            failed = libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0)
            os.close(handle)
            if failed:
                raise OSError(ctypes.get_errno(), "landlock_add_rule", path)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)
    return ["files"] + (["tcp"] if version >= 4 else []) + (["signals"] if version >= 6 else [])


def become(uids: tuple[int, ...]) -> bool:
    """Become the first user of `uids` that the OS allows; its rights go with that."""
    for uid in uids:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError:
            continue
        return True
    return False


def drop_capabilities() -> None:
    """Give up what a user namespace of one's own had brought."""
    if libc.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")
