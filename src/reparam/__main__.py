"""`python -m reparam` runs the command `reparam`."""

from reparam.cli import main

if __name__ == "__main__":
    main()
