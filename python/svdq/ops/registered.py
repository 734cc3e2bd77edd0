"""The operators as torch knows them; tests put in their place what runs them elsewhere."""

import torch

from svdq import _C  # noqa: F401  (registers the operators)

OPERATORS = torch.ops.svdq
