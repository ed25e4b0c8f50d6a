"""`python -m asyncrl` is `asyncrl`."""

from asyncrl.cli import entry

if __name__ == "__main__":
    entry()
