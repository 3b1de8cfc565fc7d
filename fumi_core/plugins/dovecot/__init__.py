"""Logins and users of a Dovecot: its protocol (sans-IO), one connection for many requests, and two plugins."""
