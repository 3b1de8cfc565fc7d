"""``python -m fumi_edge`` is the same program as ``fumi-edge``."""

from fumi_edge.cli import main

if __name__ == "__main__":
    main(prog_name="fumi-edge")
