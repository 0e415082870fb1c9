"""A family's adapter against its stock pipeline: what `vipo check-generator` prints, and what the tests assert."""
