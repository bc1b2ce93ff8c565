"""`python -m kdtrainer speech`: an ensemble of speech recognisers into one frozen encoder with adapters."""
