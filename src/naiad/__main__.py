"""`python -m naiad` is `naiad`."""

from naiad.cli.main import main

if __name__ == "__main__":
    main()
