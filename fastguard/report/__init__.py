"""`fastguard report`: the records of a run as one page to look at, on a desk or a phone, offline."""
