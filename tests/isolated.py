"""For tests that run a copy of the package in a process of its own."""

# An editable installation finds a module that is missing in a copied package in the checkout, and so hides that it is.
NOT_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]
"""
