"""``python -m timm_mamba_pkd`` is the ``mamba-pkd`` command."""

import sys

from timm_mamba_pkd.cli import main

sys.exit(main())
