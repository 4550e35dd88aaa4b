"""Operators: one folder each, the plain PyTorch reference beside the fast versions."""
