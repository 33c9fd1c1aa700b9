"""What is given away: a plain PEFT adapter, and answers to prompts."""
