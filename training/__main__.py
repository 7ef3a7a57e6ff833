"""`accelerate launch -m controlkit.training CONFIG.toml [key=value ...]`: the command `controlkit train`."""

import sys

if __name__ == "__main__":
    from controlkit.cli import app

    app(["train", *sys.argv[1:]], prog_name="python -m controlkit.training")
