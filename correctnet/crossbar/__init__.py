"""Layers whose weights a crossbar holds, and the conversion of networks to them."""
