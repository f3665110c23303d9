"""`python -m jes.metacognition`."""

from jes.metacognition import study

__doc__ = study.__doc__  # what --help shows

study.main()
