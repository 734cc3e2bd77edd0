"""How the tensors of a cache are made."""

import torch

# Tensors made under inference mode cannot be updated in place outside of it. A cache may live
# through both, so whatever it updates is made outside; updating that is allowed everywhere.
normal_tensors = torch.inference_mode(False)
