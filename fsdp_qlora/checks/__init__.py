"""What is watched: does this run compute what the model's authors wrote."""
