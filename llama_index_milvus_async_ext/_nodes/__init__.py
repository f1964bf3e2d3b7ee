"""From a node to the row that stores it, and back."""
