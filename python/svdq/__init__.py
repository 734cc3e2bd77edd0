"""SVDq: the key cache of a language model at about one bit a number, attended without unpacking it.

``import svdq`` registers the attention implementation ``"svdq"`` with transformers; a model loaded
with ``attn_implementation="svdq"`` then accepts an :class:`SVDqCache` as ``past_key_values``.
"""

from svdq import ops
from svdq.cache.cache import SVDqCache
from svdq.config import presets
from svdq.fit.profile import Profile
from svdq.hf.attention import register
from svdq.layout import PageLayout

__version__ = "0.1.0"
__all__ = ["PageLayout", "Profile", "SVDqCache", "__version__", "ops", "presets"]

register()
