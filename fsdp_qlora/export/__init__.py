"""What a run exports: a plain PEFT adapter, and the base model in 4 bits."""
