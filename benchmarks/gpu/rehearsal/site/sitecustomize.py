"""Every interpreter below ``rehearse.sh`` starts with this: torch, once imported, gets the rehearsal's operators.

torch is not imported here: commands that do without it start as they always do.
"""

import ctypes
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _AfterTorch(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        spec = PathFinder.find_spec(fullname)
        if spec is None or (loader := spec.loader) is None:
            return None
        sound = loader.exec_module

        def executed(module: ModuleType) -> None:
            sound(module)
            sys.meta_path.remove(self)
            if not hasattr(ctypes.CDLL(None), "rehearsal_runtime"):
                sys.exit(
                    "error: LD_PRELOAD did not load the rehearsal; is there a space or a colon in the checkout's path?"
                )
            ctypes.CDLL(os.path.join(os.environ["REHEARSAL_BUILT"], "operators.so")).rehearsal_take_over()  # noqa: PTH118
            # Convolutions are the CPU's, and cuDNN is not loaded.
            module.backends.cudnn.enabled = False

        loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if "REHEARSAL_BUILT" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
