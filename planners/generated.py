"""CasADi functions as compiled C code, where there is a compiler; kept on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import casadi

# Not -ffast-math: a library that is linked with it flushes small numbers to 0 in all of the process.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")


def compiler() -> str | None:
    """The C compiler: $CC, or the first of cc, gcc and clang that is found."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def generated(functions: list[casadi.Function]) -> list[casadi.Function]:
    """The same functions as compiled C code, or the functions themselves, with a warning, where that fails.

    The library is kept under a hash of its code, compiler and processor in $XDG_CACHE_HOME/mbrl-kit (~/.cache by
    default), and found there the next time.
    """
    command = compiler()
    if command is None:
        warnings.warn(
            "Code generation needs a C compiler, and none was found ($CC, cc, gcc, clang): expressions are interpreted "
            "instead.",
            RuntimeWarning,
            stacklevel=2,
        )
        return functions
    code = casadi.CodeGenerator("generated.c")
    for function in functions:
        code.add(function)
    source = code.dump()
    key = hashlib.sha256("\0".join([source, _version(command), *_FLAGS, _processor()]).encode()).hexdigest()[
        :32
    ]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbrl-kit"
    library = root / f"{key}.so"
    try:
        if not library.exists():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                written, built = Path(folder, "code.c"), Path(folder, "code.so")
                written.write_text(source)
                subprocess.run(
                    [command, *_FLAGS, str(written), "-o", str(built), "-lm"],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                os.replace(built, library)  # complete, or not there
        return [casadi.external(function.name(), str(library)) for function in functions]
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        said = (error.stderr if isinstance(error, subprocess.CalledProcessError) else "") or str(error)
        warnings.warn(
            f"Code could not be generated with {command}: {said.strip()[-300:]} Expressions are interpreted instead.",
            RuntimeWarning,
            stacklevel=2,
        )
        return functions


def _version(command: str) -> str:
    return subprocess.run([command, "--version"], check=False, capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith("flags")), os.uname().machine)
