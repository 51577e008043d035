"""The `peel` command, also as `python -m peelcli`."""

from typing import NoReturn

from peelcli.cli import signals


def main() -> NoReturn:
    """Run the command line; a signal is handled from here on, while the rest is imported too."""
    signals.install()
    from peelcli.cli.main import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
