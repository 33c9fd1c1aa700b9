"""Files on any file system: what strangers wrote is read with care, what we write appears whole."""
