"""Runs a program with little left to harm: the child's side of the Python tool.

Started as a script by `tracer.agents.tools.python` with ``-I -S`` and settings as JSON in its one argument; the program
comes over standard input. Imports only the standard library. Each kernel feature is used where it exists: a kernel
without Landlock or without user namespaces still gets the limits.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import linecache
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Sequence

# Refused system calls: new processes and threads, other programs, sockets, signals to and memory of others, and what
# could undo the limits. Numbers from the kernel's tables for each architecture, in the order of the names.
_NAMES = (
    "socket socketpair clone clone3 fork vfork execve execveat kill tkill tgkill pidfd_send_signal pidfd_getfd ptrace "
    "process_vm_readv process_vm_writev prlimit64 setrlimit unshare setns mount bpf io_uring_setup keyctl"
)
_REFUSED = {
    "x86_64": (
        0xC000003E,
        (41, 53, 56, 435, 57, 58, 59, 322, 62, 200, 234, 424, 438, 101)
        + (310, 311, 302, 160, 272, 308, 165, 321, 425, 250),
    ),
    "aarch64": (
        0xC00000B7,
        (198, 199, 220, 435, 221, 281, 129, 130, 131, 424, 438, 117) + (270, 271, 261, 164, 97, 268, 40, 280, 425, 219),
    ),
}
_X32 = 0x40000000
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_READ = 0b1100  # Landlock: read files, list directories.


def limit(seconds: int, memory: int, file_size: int) -> None:
    """Set resource limits that the program cannot raise again.

    Args:
        seconds: Processor time.
        memory: Address space, in bytes.
        file_size: Largest file it may write, in bytes.
    """
    for which, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # macOS refuses an address-space limit; the other ones still hold.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(which, (value, value))


def leave_namespaces(libc: ctypes.CDLL) -> bool:
    """Move into namespaces of its own, where there is no network and root has no power outside."""
    both = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
    return bool(libc.unshare(both) == 0 or libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) == 0)


def restrict_files(libc: ctypes.CDLL, readable: Sequence[str], writable: str) -> bool:
    """Close the file system but for some paths, by Landlock (system calls 444-446 on every architecture)."""
    libc.syscall.restype = ctypes.c_long
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    # Network ports since version 4, signals and abstract sockets since version 6.
    rules = struct.pack("QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(444, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return False
    for path, rights in [*((path, _READ) for path in readable), (writable, handled & ~1)]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= 0b100
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)
    closed = bool(libc.syscall(446, ruleset, 0) == 0)
    os.close(ruleset)
    return closed


def refuse_calls(libc: ctypes.CDLL) -> bool:
    """Refuse some system calls with "operation not permitted", by a seccomp filter."""
    if platform.machine() not in _REFUSED:
        return False
    architecture, numbers = _REFUSED[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    checks = [(at_least, _X32), *((equal, number) for number in numbers)]
    # A match jumps over the checks that are left and the "allow" behind them.
    steps += [(code, len(checks) - i, 0, value) for i, (code, value) in enumerate(checks)]
    steps += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    packed = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0) == 0)


def _standard_library() -> list[str]:
    library = os.path.dirname(os.__file__)
    shared = os.path.join(sys.base_prefix, "lib")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache"]
    return [library, shared, *system, "/dev/null", "/dev/urandom", "/dev/zero"]


def confine(seconds: int, memory: int, file_size: int) -> None:
    """Apply every protection that this system has; the working directory stays writable."""
    limit(seconds, memory, file_size)
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    leave_namespaces(libc)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restrict_files(libc, _standard_library(), os.getcwd())
    refuse_calls(libc)


def execute(source: str) -> int:
    """Run a program; like an interactive session, print the value of a last line that is an expression.

    Returns:
        The exit code: 1 after an exception, whose traceback goes to standard error.
    """
    name = "<code>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, object] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), scope)  # noqa: S102 - running code is what this process is for
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), scope)  # noqa: S307
            if value is not None:
                print(repr(value))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != name:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames, limit=-5)
        return 1
    return 0


def main() -> None:
    """Read the program, close standard input, confine this process and run the program."""
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv[:] = [""]
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    confine(settings["seconds"], settings["memory"], settings["file_size"])
    code = execute(source)
    try:
        sys.stdout.flush()
    finally:
        # No finalisers: what the program left running or registered must not go on.
        os._exit(code & 0xFF)


if __name__ == "__main__":
    main()
