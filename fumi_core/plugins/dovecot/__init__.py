"""Checks logins and users with Dovecot: its protocol (sans-IO), one connection for many requests, and two plugins."""
