"""`fastguard report`: the records of a run as one page that needs no network."""
