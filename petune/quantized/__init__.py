"""Weights of a few bits: the quantiser, linear maps and heads made with it, packed checkpoints, a store of tasks."""
