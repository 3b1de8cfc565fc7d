"""``fumi-core`` without its flags: from settings to an app, its users and its mail log."""
