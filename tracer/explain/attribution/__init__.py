"""What each step read: gradients and attention."""
