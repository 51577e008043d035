"""`python -m peelcli` is the `peel` command."""

from peelcli.cli.main import main

if __name__ == "__main__":
    main()
