"""SVDq: the key cache of a language model at about one bit a number, attended without unpacking it.

``import svdq`` registers the attention implementation ``"svdq"`` with transformers; a model loaded
with ``attn_implementation="svdq"`` then accepts an :class:`SVDqCache` as ``past_key_values``.
"""

from svdq import fakes, ops, presets  # noqa: F401  (fakes registers itself)
from svdq.attention import register
from svdq.cache import SVDqCache
from svdq.layout import PageLayout
from svdq.profile import Profile

__version__ = "0.1.0"
__all__ = ["PageLayout", "Profile", "SVDqCache", "__version__", "ops", "presets"]

register()
