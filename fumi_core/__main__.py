"""``python -m fumi_core`` is the same program as ``fumi-core``."""

from fumi_core.cli import main

if __name__ == "__main__":
    main(prog_name="fumi-core")
