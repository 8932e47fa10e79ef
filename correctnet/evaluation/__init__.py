"""Monte Carlo evaluation over chip samples, and its results."""
