"""The process of the `controlkit` command, which is also `python -m controlkit`."""

from controlkit import cli
from controlkit.startup import fill_closed_streams, run_to_the_end


def main() -> None:
    """Run the command, and end the process."""
    fill_closed_streams()
    run_to_the_end(cli.main)


if __name__ == "__main__":
    main()
