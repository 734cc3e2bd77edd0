"""What transformers asks for and says: attention and mask functions, rotary embeddings."""
