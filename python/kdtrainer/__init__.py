"""kdtrainer: small, complete distillation runs on the public API of kdkernels. `python -m kdtrainer --help`."""
