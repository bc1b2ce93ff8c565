"""`python -m kdtrainer subspace`: heads in a small subspace, and students that live there (arXiv 2512.23410)."""
