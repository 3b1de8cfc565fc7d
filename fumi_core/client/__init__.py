"""The client's side of SMTP (RFC 5321) and LMTP (RFC 2033): what passes mail on needs it, and nothing else of the core.

``answers`` reads what a server says, sans-IO; ``connection`` is one connection to it; ``pool`` keeps those that are idle.
"""
