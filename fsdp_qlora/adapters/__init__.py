"""What is trained: adapters on a frozen base."""
