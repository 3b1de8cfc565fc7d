"""The same settings as another program's configuration."""
