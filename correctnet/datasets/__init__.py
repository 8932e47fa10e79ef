"""Data sets, and the contract for data of any kind."""
