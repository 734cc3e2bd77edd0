"""The cache that transformers sees, its reports and its files."""
