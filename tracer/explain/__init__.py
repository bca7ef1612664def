"""What each step read, whether the model took it for true, and whether it mattered."""
