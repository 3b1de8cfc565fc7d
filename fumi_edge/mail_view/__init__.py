"""The pages of --dev that show the mail in ./maildir."""
