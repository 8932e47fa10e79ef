"""The whole method in one call, on any network and data."""
