"""Device models: what programming a crossbar does to the weights."""
