"""What this machine has, and what a network becomes on it."""
