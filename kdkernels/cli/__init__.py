"""`python -m kdkernels doctor | validate | bench`."""
