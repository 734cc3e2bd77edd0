"""How the tensors of a cache are made."""

from __future__ import annotations

import torch
from torch import Tensor

# Tensors made under inference mode cannot be updated in place outside of it. A cache may live
# through both, so every tensor that it updates is made outside; updating is allowed everywhere.
normal_tensors = torch.inference_mode(False)


def int32_tensor(values: list, device: torch.device) -> Tensor:
    """Integers as operators take them."""
    return torch.tensor(values, dtype=torch.int32, device=device)
