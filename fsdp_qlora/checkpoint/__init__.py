"""What is kept: sharded safetensors and a JSON manifest, no pickle anywhere."""
