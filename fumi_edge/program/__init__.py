"""``fumi-edge`` without its flags: the work of a process, its checks, and --dev."""
