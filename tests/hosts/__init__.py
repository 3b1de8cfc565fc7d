"""Mail through six hosts, of which one dies: network namespaces, real programs, a steady load."""
