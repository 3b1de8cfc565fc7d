"""``fumi-core`` without its flags: from the settings to an app, with its users and its mail log."""
