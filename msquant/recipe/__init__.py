"""What a recipe asks for, and its files."""
