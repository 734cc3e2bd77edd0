"""Adapters to transformers: attention and mask functions, arguments, rotary embeddings."""
