"""Files: atomic writes, and reads that name the mistake."""
