"""Output heads and their losses."""
