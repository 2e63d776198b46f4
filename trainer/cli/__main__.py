"""`python -m shoestring.trainer.cli`."""

from . import main

if __name__ == "__main__":
    main()
