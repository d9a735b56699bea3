"""``python -m data_prep``."""

from data_prep.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m data_prep")
