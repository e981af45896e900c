"""Bits: the arithmetic of grids, quantizers on a model's graph, prices of bits, rounding by output error, packed files."""
