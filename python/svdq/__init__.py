"""SVDq: the key cache of a language model at about one bit a number, attended without unpacking it.

``import svdq`` registers the attention implementation ``"svdq"`` with transformers; a model loaded
with ``attn_implementation="svdq"`` then takes an :class:`SVDqCache`, under the name that
:func:`cache_argument` finds: ``model.generate(**inputs, **svdq.cache_argument(cache))``.
"""

from svdq import ops
from svdq.cache.cache import SVDqCache
from svdq.config import presets
from svdq.config.settings import Settings
from svdq.fit.calibration import Calibration
from svdq.fit.profile import Profile
from svdq.fit.value_loss import sample_positions
from svdq.hf.arguments import cache_argument
from svdq.hf.attention import register
from svdq.layout import PageLayout

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "PageLayout",
    "Profile",
    "SVDqCache",
    "Settings",
    "__version__",
    "cache_argument",
    "ops",
    "presets",
    "sample_positions",
]

register()
