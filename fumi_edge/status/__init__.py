"""What the status page of the edge shows."""
