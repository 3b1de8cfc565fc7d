"""The pages of --dev that show what has arrived in ./maildir."""
