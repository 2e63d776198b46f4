"""Silence for what the libraries say of themselves."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Lightning's and DeepSpeed's remarks on what the plan has already said, and bars for work of a second."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("pytorch_lightning", "lightning_fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # kernels for other GPUs, deprecations of other packages, a loss that is not used
    for name in ("torchao", "torch.utils._pytree", "transformers.modeling_utils", "transformers.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_", "torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", module=module)
