"""The entry point: `bkd-fast`, or `python -m bkd_fast.app`."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from bkd_fast.app.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "bkd_fast").partition(".")[0] == "bkd_fast":
            raise
        sys.exit(f"bkd-fast needs {error.name}, which the app extra brings: pip install 'bkd_fast[app]'")
    app()


if __name__ == "__main__":
    main()
