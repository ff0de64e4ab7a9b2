"""`python -m pipelines` is the same as `mone`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
