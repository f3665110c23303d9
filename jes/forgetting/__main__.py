"""`python -m jes.forgetting`."""

from jes.forgetting import study

__doc__ = study.__doc__  # what --help shows

study.main()
