"""`python -m edgeprune.cli`: the command line where its script is not on the PATH."""

from edgeprune.cli.app import main

if __name__ == "__main__":
    main()
