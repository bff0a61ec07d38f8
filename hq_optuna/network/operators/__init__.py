"""PyTorch's operators, watched while a network runs: whose weights they use, what they keep."""
