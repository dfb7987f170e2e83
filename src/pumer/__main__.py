"""`python -m pumer`: the command line, where scripts are not on the path."""

from pumer.cli import main

if __name__ == "__main__":
    main()
