"""What each command does, from its first check to its last file."""
