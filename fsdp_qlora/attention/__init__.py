"""Attention implementations, and the layouts of rows that go with them."""
