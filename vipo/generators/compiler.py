"""What compiled blocks need of a machine with a GPU: Triton builds what starts its kernels with a C compiler."""

import os
import shutil
import sysconfig
from pathlib import Path

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError


def check_compiler(config: GeneratorConfig) -> None:
    """Refuse blocks that could not be compiled, long before the first is called.

    Raises:
        GeneratorError: `config.compile` asks for compiled blocks on a GPU, and this machine has no C compiler, or not
            Python's headers; the message names the packages.
    """
    if config.compile == "none" or not config.device.startswith("cuda"):
        return
    missing = {}
    # As Triton looks for both.
    if not any(shutil.which(name) for name in ([os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        missing["a C compiler (gcc or clang; or what CC names)"] = "gcc libc6-dev"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not (Path(headers) / "Python.h").is_file():
        missing["Python.h"] = f"python{sysconfig.get_python_version()}-dev"
    if missing:
        raise GeneratorError(
            f"generator.compile {config.compile!r} on {config.device}: {' and '.join(missing)} not here, with which "
            f"Triton builds: install {' '.join(missing.values())} (Debian's names), or set generator.compile=none"
        )
