"""`python -m textgen_client` is the `textgen` command."""

from textgen_client.cli import main

if __name__ == "__main__":
    main()
