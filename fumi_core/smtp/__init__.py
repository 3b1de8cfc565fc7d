"""What is said and what it means: SMTP, LMTP and AUTH, sans-IO."""
