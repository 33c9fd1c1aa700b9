"""The transformers model: its folder, config, tokenizer, skeleton on meta, and the FSDP root module."""
