"""`python -m fake_engine --help`."""

from .cli import main

if __name__ == "__main__":
    main()
