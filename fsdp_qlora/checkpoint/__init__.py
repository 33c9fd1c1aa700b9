"""Checkpoints as sharded safetensors with a JSON manifest, without any pickle."""
