"""Makes ``import timm`` enough to create the students of timm_mamba_pkd.

torch calls `install` at the end of ``import torch`` (entry point of the group ``torch.backends``), so nothing here may
raise. This module stands outside of the package, so that loading it loads nothing else.
TIMM_MAMBA_PKD_AUTOLOAD=0 switches it off.
"""

import importlib
import importlib.util
import logging
import os
import sys

_logger = logging.getLogger(__name__)


def install():
    """Has the students registered as soon as timm.models is there."""
    try:
        if os.environ.get("TIMM_MAMBA_PKD_AUTOLOAD") == "0":
            return
        if "timm.models" not in sys.modules:
            if not any(isinstance(finder, _TimmModelsFinder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _TimmModelsFinder())
        elif hasattr(sys.modules["timm"], "create_model"):  # else timm is half imported, and cannot be helped
            _register()
    except Exception:
        _logger.debug("timm_mamba_pkd cannot wait for timm", exc_info=True)


def _register():
    if "timm_mamba_pkd" in sys.modules:
        return  # imported, or being imported around us (then a circular import from here): it registers itself
    try:
        importlib.import_module("timm_mamba_pkd.models")
    except Exception as error:
        _logger.warning("timm_mamba_pkd is installed but broken, timm does without its models: %r", error)


class _TimmModelsFinder:
    """Finds timm.models once, as the other finders do, and has the students registered after it has executed.

    It waits for timm.models, not for timm: the register is complete there, and timm itself need not be.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            _call_after_execution(spec.loader, _register)
        return spec


def _call_after_execution(loader, function):
    def exec_module(module):
        del loader.exec_module  # the loader is again what it was
        loader.exec_module(module)
        function()

    try:
        loader.exec_module = exec_module
    except Exception:
        _logger.debug("timm_mamba_pkd cannot wait for timm", exc_info=True)
