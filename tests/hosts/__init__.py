"""Mail through six hosts, of which one or the other dies: network namespaces, real programs, a steady load."""
