"""One run from start to end: prepare, train, save, export."""
