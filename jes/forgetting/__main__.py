"""`python -m jes.forgetting`: see `jes.forgetting.study`."""

from jes.forgetting.study import main

main()
