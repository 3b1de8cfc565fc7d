"""What a handler gets, and how a chain of handlers runs."""
