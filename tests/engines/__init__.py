"""Fumi run by real engines: systemd and containers, each started by its test."""
