"""`python -m pumer`: the command line, where the scripts of an environment are not on the path."""

from pumer.cli import main

if __name__ == "__main__":
    main()
