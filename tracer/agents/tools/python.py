"""A tool that runs Python code in a separate, limited process. It is off unless asked for by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess  # noqa: S404 - starting a separate process is the protection here
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tracer.errors import InputError, ToolError

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

MAX_CODE_BYTES = 100_000
MAX_OUTPUT_BYTES = 64 * 1024
MAX_FILE_BYTES = 8 * 1024 * 1024

_CONFINE = Path(__file__).with_name("confine.py")
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": ""}


def _start(folder: str, timeout: float, memory_mb: int) -> subprocess.Popen[bytes]:
    settings = {
        "seconds": math.ceil(timeout) + 1,
        "memory": memory_mb * 1024 * 1024,
        "file_size": MAX_FILE_BYTES,
    }
    try:
        return subprocess.Popen(  # noqa: S603 - a fixed program; the code goes over its standard input
            [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", str(_CONFINE), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
    except OSError as error:
        raise ToolError(f"python could not be started: {error.strerror or error}") from None


def _collect(process: subprocess.Popen[bytes], code: bytes, deadline: float) -> tuple[bytes, bool]:
    """Send the code and read output until its end, the deadline or the cap; also says whether time ran out."""
    if process.stdin is None or process.stdout is None:
        raise ToolError("python could not be started: no pipes")
    output = bytearray()
    unsent = memoryview(code)
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(output), True
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    with contextlib.suppress(BrokenPipeError):
                        unsent = unsent[os.write(key.fd, unsent) :] if unsent else unsent
                        if unsent:
                            continue
                    selector.unregister(process.stdin)
                    process.stdin.close()
                    continue
                data = os.read(key.fd, 65536)
                output += data
                if not data or len(output) > MAX_OUTPUT_BYTES:
                    return bytes(output), False


def _stop(process: subprocess.Popen[bytes], grace: float) -> int:
    """Wait a moment for the process, then kill its whole group and reap it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    return code


def run_code(code: str, *, timeout: float = 5.0, memory_mb: int = 512) -> str:
    """Run Python code in a separate limited process and return what it printed.

    Args:
        code: The program. As in an interactive session, the value of a last line that is an expression is printed.
        timeout: Seconds until the process group is killed.
        memory_mb: Address space of the process, in MiB.

    Returns:
        Standard output and standard error together, at most 64 KiB. An exception in the code shows as its traceback.

    Raises:
        ToolError: If the code is too long, runs too long, is killed, or Python cannot be started.
    """
    source = code.encode("utf-8", "replace")
    if not source.strip():
        raise ToolError("there is no code to run")
    if len(source) > MAX_CODE_BYTES:
        raise ToolError(f"the code has {len(source)} bytes; at most {MAX_CODE_BYTES} are run")
    with tempfile.TemporaryDirectory(prefix="tracer-python-", ignore_cleanup_errors=True) as folder:
        process = _start(folder, timeout, memory_mb)
        late, output = True, b""
        deadline = time.monotonic() + timeout
        try:
            output, late = _collect(process, source, deadline)
        finally:
            flooded = len(output) > MAX_OUTPUT_BYTES
            status = _stop(process, 0.0 if late or flooded else max(deadline - time.monotonic(), 0.0))
    text = output[:MAX_OUTPUT_BYTES].decode("utf-8", "replace")
    if flooded:
        return f"{text}\n[stopped: more than {MAX_OUTPUT_BYTES} bytes of output]"
    if late or status == -signal.SIGXCPU:
        raise ToolError(f"the code ran longer than {timeout:g} s and was stopped{_tail(text)}")
    if status < 0:
        raise ToolError(f"the code was killed by {_signal_name(-status)}, perhaps for its memory{_tail(text)}")
    return text.strip("\n") or "(no output; use print to show a value)"


def _tail(text: str) -> str:
    last = " ".join(text.split())[-200:]
    return f"; the end of its output: {last}" if last else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def python_tool(timeout: float = 5.0, memory_mb: int = 512) -> BaseTool:
    """Build a tool named ``python`` that takes ``code`` and runs it in a separate limited process.

    Everywhere: a process and session of its own; limits on processor time, address space, file size (8 MiB), open
    files, core dumps and, unless the user is root, processes; an empty folder as working directory that is removed
    afterwards; no environment variables of the caller; ``python -I -S``, so only the standard library; no standard
    input; 64 KiB of output; the whole process group killed after ``timeout``.

    On Linux, where the kernel allows it: namespaces without a network; Landlock, so that only the standard library,
    the system's shared libraries and the working directory can be opened; and a seccomp filter (x86-64 and ARM64)
    that refuses new processes and threads, other programs, sockets and signals.

    It is **not** a sandbox against hostile code. It shares the kernel and the user's account with the caller; a bug in
    the kernel, or a system without the features of the second paragraph (macOS, some containers), leaves the user's
    files readable, the network open and other processes of the user within reach. Several files of 8 MiB can fill a
    disk within the time limit. Run untrusted agents in a virtual machine or a container.

    Args:
        timeout: Seconds until the process group is killed, above 0 and at most 600.
        memory_mb: Address space of the process, in MiB, at least 64.

    Returns:
        The tool.

    Raises:
        InputError: If the time or memory limit is out of range, or the system has no such limits (Windows).
    """
    from langchain_core.tools import StructuredTool

    if not 0 < timeout <= 600:
        raise InputError(f"the Python tool's timeout must be above 0 and at most 600 s; got {timeout:g}")
    if memory_mb < 64:
        raise InputError(f"the Python tool needs at least 64 MiB of memory; got {memory_mb}")
    if os.name != "posix":
        raise InputError("the Python tool needs Linux or macOS; leave it out")

    def run(code: Annotated[str, "Python code; print what should be seen"]) -> str:
        return run_code(code, timeout=timeout, memory_mb=memory_mb)

    return StructuredTool.from_function(
        func=run,
        name="python",
        description="Runs Python code (standard library only, no network, no files) and returns what it prints.",
    )
