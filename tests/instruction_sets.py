"""Instruction sets of the C++ core."""

ISAS = ["portable", "avx2", "avx512", "avx512bf16", "amx"]
