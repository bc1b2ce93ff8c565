"""`python -m kdtrainer compress`: a state-space model that loses states while it learns (arXiv 2510.02823)."""
