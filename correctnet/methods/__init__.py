"""The methods of the paper, and baselines."""
