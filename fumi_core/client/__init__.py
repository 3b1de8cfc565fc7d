"""The client's side of SMTP (RFC 5321) and LMTP (RFC 2033), for delivery to a next hop. It uses nothing else of the core.

``replies`` parses a server's replies, sans-IO; ``connection`` is one connection to a server; ``pool`` keeps idle ones.
"""
