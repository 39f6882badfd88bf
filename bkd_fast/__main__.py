"""`python -m bkd_fast`, and `torchrun ... -m bkd_fast`: the command line."""

from bkd_fast.app.__main__ import main

if __name__ == "__main__":
    main()
