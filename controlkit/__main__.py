"""`python -m controlkit`: the same as the `controlkit` command."""

from controlkit.cli import main

if __name__ == "__main__":
    main()
