"""The SMTP, LMTP and AUTH protocols, sans-IO: their syntax and their meaning."""
