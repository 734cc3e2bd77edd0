"""Speed: timing in one run against torch, memory bandwidth, and what machine it was."""
