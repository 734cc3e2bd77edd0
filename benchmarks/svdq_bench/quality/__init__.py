"""Quality of a compressed cache on real text: perplexity, KL divergence, bytes, and the demo."""
