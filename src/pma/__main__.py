"""`python -m pma` is the command `pma`."""

from pma.cli import main

if __name__ == "__main__":
    main()
