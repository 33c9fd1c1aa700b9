"""File access on any file system: untrusted files are read defensively, our own are written atomically."""
