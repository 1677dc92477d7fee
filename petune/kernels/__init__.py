"""Functional operators, one folder each: the plain-torch reference, the kernel, and the public name."""
