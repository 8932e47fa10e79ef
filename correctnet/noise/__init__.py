"""Device noise as a function of its address, and every other stream of random numbers."""
