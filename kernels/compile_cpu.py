"""Compile a C++ file of this folder on first use and load it with ctypes.

A plain C interface needs no torch headers, so that a build takes seconds, and ctypes releases the GIL during a call. The
library lands in $SERVE_CACHE/kernels (default ~/.cache/serve.py), named by a hash of all that decides its machine code.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")


class CompileError(Exception):
    """Says in one line why a kernel could not be built: no compiler, or what the compiler complained about."""


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """Return the library of a C++ file, built unless the cache has it. Raises CompileError.

    Further flags choose a variant: -DPORTABLE builds the bodies that need no particular CPU.
    """
    library = _library_path(source, flags)
    if not library.exists():
        _build(source, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # a cache carried to a machine without the libraries it was linked to
        raise CompileError(f"{library.name} does not load: {error}") from error


def problem(build: Callable[[], object]) -> str | None:
    """Return why what loads a library cannot do so, or None once it has."""
    try:
        build()
    except CompileError as error:
        return str(error)
    return None


def _compiler() -> str:
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise CompileError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")


def _library_path(source: Path, flags: tuple[str, ...]) -> Path:
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    files = [source, *sorted(source.parent.glob("*.h"))]
    parts = [*(file.read_bytes() for file in files), version, " ".join(FLAGS + flags).encode(), _cpu().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("SERVE_CACHE") or Path.home() / ".cache" / "serve.py") / "kernels"
    return folder / f"{source.stem}-{digest}.so"


@functools.cache
def _cpu() -> str:
    """Return what -march=native sees: model and instruction sets on Linux, the machine's name for itself elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model", "CPU part"))}))


def _build(source: Path, flags: tuple[str, ...], library: Path) -> None:
    """Compile into a temporary file and rename it, so that no other process ever loads half a library."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".so", dir=library.parent)
    except OSError as error:
        raise CompileError(f"cannot write to {library.parent}: {error}") from error
    os.close(handle)
    try:
        command = [_compiler(), *FLAGS, *flags, str(source), "-o", partial, *_openmp()]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            complaint = next((line for line in result.stderr.splitlines() if "error" in line), "no reason given")
            raise CompileError(f"{Path(command[0]).name} failed on {source.name}: {complaint}")
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _openmp() -> list[str]:
    """Link to the OpenMP runtime that torch brought along: a second one would fight it for the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    bundled += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return [str(bundled[0]), "-Wl,--as-needed"] if bundled else []
