r"""``python -m pyro_vaediff`` trains, evaluates and shows a variational autoencoder."""

from .arguments import exit_on_error
from .train.main import main

if __name__ == "__main__":
    with exit_on_error("continue with --resume"):
        main()
